"""One query per row over its paged history, split along the keys so that few rows still fill the device.

The query heads that share a kv head form one tile, so keys and values are read once. Partial results are
merged by their maxima and sums (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from .tile import load_blocks, load_tokens, online_softmax

KEYS_PER_SPLIT = 256  # fewer do not pay for a program and its partial result
MAX_SPLITS = 64
PROGRAMS = 4096  # with more than these, further splits are empty programs


@triton.jit(do_not_specialize=["b_b", "SPLITS"], do_not_specialize_on_alignment=["p_rows", "p_context"])
def _split_kernel(
    p_q,
    p_key,
    p_value,
    p_blocks,
    p_rows,
    p_context,
    p_o,
    p_part,
    p_max,
    p_sum,
    scale_log2,
    q_b,
    q_h,
    kc_b,
    kc_t,
    kc_h,
    vc_b,
    vc_t,
    vc_h,
    b_b,
    o_b,
    o_h,
    SPLITS,
    PARTIAL: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the output [B, H, D], or if PARTIAL part [B, H, SPLITS, D]: each split's unnormalised output, with its
    maximum (log2 units) and sum; a split past the end of its row writes the maximum alone, -inf."""
    i_s, i_kv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_g, o_d = tl.arange(0, BG), tl.arange(0, BD)
    i_h = i_kv * G + o_g
    i_part = (i_b * H + i_h) * SPLITS + i_s
    length = tl.load(p_context + i_b) + 1
    span = tl.cdiv(tl.cdiv(length, SPLITS), BN) * BN
    start = i_s * span
    end = tl.minimum(start + span, length)
    if PARTIAL and start >= length:
        tl.store(p_max + i_part, tl.full([BG], float("-inf"), tl.float32), mask=o_g < G)
        return
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    p_key += i_kv * kc_h
    p_value += i_kv * vc_h
    p_blocks += tl.load(p_rows + i_b).to(tl.int64) * b_b
    b_block = load_blocks(p_blocks, start, end, BLOCK_SIZE, BN)
    b_q = tl.load(p_q + i_b * q_b + i_h[:, None] * q_h + o_d[None, :], mask=m_q, other=0.0)

    b_o = tl.zeros([BG, BD], tl.float32)
    b_max = tl.full([BG], float("-inf"), tl.float32)
    b_sum = tl.zeros([BG], tl.float32)
    for i_n in range(start, end, BN):
        b_k = load_tokens(p_key, b_block, i_n, end, kc_b, kc_t, False, BLOCK_SIZE, D, BN, BD)
        b_v = load_tokens(p_value, b_block, i_n, end, vc_b, vc_t, True, BLOCK_SIZE, D, BN, BD)
        b_block = load_blocks(p_blocks, i_n + BN, end, BLOCK_SIZE, BN)
        # [BG, BD] @ [BD, BN] -> [BG, BN]
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_score = tl.where((i_n + tl.arange(0, BN) < end)[None, :], b_score, float("-inf"))
        b_o, b_max, b_sum = online_softmax(b_o, b_max, b_sum, b_score, b_v, scale_log2, PRECISION)
    if PARTIAL:
        tl.store(p_part + i_part[:, None] * D + o_d[None, :], b_o, mask=m_q)
        tl.store(p_max + i_part, b_max, mask=o_g < G)
        tl.store(p_sum + i_part, b_sum, mask=o_g < G)
    else:
        b_o = b_o / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
        tl.store(p_o + i_b * o_b + i_h[:, None] * o_h + o_d[None, :], b_o.to(p_o.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=["SPLITS"])
def _merge_kernel(
    p_part,
    p_max,
    p_sum,
    p_o,
    o_b,
    o_h,
    SPLITS,
    H: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_s, o_d = tl.arange(0, BS), tl.arange(0, BD)
    m_s = o_s < SPLITS
    o_s += (i_b * H + i_h) * SPLITS
    b_max = tl.load(p_max + o_s, mask=m_s, other=float("-inf"))
    seen = b_max > float("-inf")  # an empty split wrote nothing else
    b_top = tl.maximum(tl.max(b_max, axis=0), -1e30)  # finite also where no split saw a key
    b_weight = tl.exp2(b_max - b_top)
    # [BS, BD]
    b_part = tl.load(p_part + o_s[:, None] * D + o_d[None, :], mask=seen[:, None] & (o_d < D)[None, :], other=0.0)
    b_sum = tl.sum(b_weight * tl.load(p_sum + o_s, mask=seen, other=0.0), axis=0)
    b_o = tl.sum(b_weight[:, None] * b_part, axis=0) / tl.where(b_sum > 0.0, b_sum, 1.0)
    tl.store(p_o + i_b * o_b + i_h * o_h + o_d, b_o.to(p_o.dtype.element_ty), mask=o_d < D)


def num_splits(num_programs: int, longest: int) -> int:
    """A power of two, for `num_programs` = rows x kv heads over tables that hold `longest` keys.

    Shapes decide alone, so a captured graph serves every length.
    """
    useful = triton.cdiv(longest, KEYS_PER_SPLIT)
    wanted = triton.next_power_of_2(max(1, min(useful, MAX_SPLITS)))
    while wanted > 1 and wanted * num_programs > PROGRAMS:
        wanted //= 2
    return wanted


def tile_options(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tiles of which several fit the shared memory of an H100 at once, each with the next on its way."""
    if dtype == torch.float32:
        return {"BN": 32, "PRECISION": "ieee", "num_warps": 8, "num_stages": 2}
    return {"BN": 64 if head_dim <= 128 else 32, "PRECISION": "tf32", "num_warps": 4, "num_stages": 3}


def decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    rows: Rows,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """q, out [B, H, D], caches [num_blocks, block_size, H_kv, D]. Contract: `Attention.decode`.

    A row with context_lens = -1 sees nothing and writes zeros.
    """
    num_rows, num_heads, head_dim = q.shape
    if num_rows == 0:
        return out
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    splits = num_splits(num_rows * num_kv_heads, block_table.shape[1] * block_size)
    part = top = total = out  # a single split touches none of the three
    if splits > 1:
        part = torch.empty(num_rows, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        top, total = torch.empty(2, num_rows, num_heads, splits, dtype=torch.float32, device=q.device)
    sizes = {"H": num_heads, "D": head_dim, "BD": max(16, triton.next_power_of_2(head_dim))}
    _split_kernel[(splits, num_kv_heads, num_rows)](
        q,
        key_cache,
        value_cache,
        block_table,
        rows.slots,
        context_lens,
        out,
        part,
        top,
        total,
        scale * math.log2(math.e),
        *q.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        *out.stride()[:2],
        splits,
        **sizes,
        PARTIAL=splits > 1,
        G=group,
        BLOCK_SIZE=block_size,
        BG=max(16, triton.next_power_of_2(group)),
        **tile_options(head_dim, q.dtype),
    )
    if splits > 1:
        _merge_kernel[(num_heads, num_rows)](
            part, top, total, out, *out.stride()[:2], splits, **sizes, BS=MAX_SPLITS, num_warps=4
        )
    return out
