"""One query per row over its paged history, split along the keys so that few rows still fill the device.

The query heads that share a kv head form one tile, so keys and values are read once. Partial results are
merged by their maxima and sums (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import load_paged, online_softmax, tile_sizes

KEYS_PER_SPLIT = 512
MAX_SPLITS = 16


@triton.jit(do_not_specialize=["b_b"], do_not_specialize_on_alignment=["p_blocks", "p_context"])
def _split_kernel(
    p_q,
    p_key,
    p_value,
    p_blocks,
    p_context,
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
    SPLITS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """part [B, H, SPLITS, D]: each split's unnormalised output, with its maximum (log2 units) and sum."""
    i_s, i_kv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(p_context + i_b) + 1
    span = tl.cdiv(tl.cdiv(length, SPLITS), BN) * BN
    start = i_s * span
    end = tl.minimum(start + span, length)
    o_g = tl.arange(0, BG)
    o_h = i_kv * G + o_g
    o_d = tl.arange(0, BD)
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    b_q = tl.load(p_q + i_b * q_b + o_h[:, None] * q_h + o_d[None, :], mask=m_q, other=0.0)
    p_key += i_kv * kc_h
    p_value += i_kv * vc_h
    p_blocks += i_b * b_b

    b_o = tl.zeros([BG, BD], tl.float32)
    b_max = tl.full([BG], float("-inf"), tl.float32)
    b_sum = tl.zeros([BG], tl.float32)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        b_k = load_paged(p_key, p_blocks, o_n, end, kc_b, kc_t, BLOCK_SIZE, D, BD)
        b_v = load_paged(p_value, p_blocks, o_n, end, vc_b, vc_t, BLOCK_SIZE, D, BD)
        # [BG, BD] @ [BD, BN] -> [BG, BN]
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        b_score = tl.where((o_n < end)[None, :], b_score, float("-inf"))
        b_o, b_max, b_sum = online_softmax(b_o, b_max, b_sum, b_score, b_v, PRECISION)
    o_part = (i_b * H + o_h) * SPLITS + i_s
    tl.store(p_part + o_part[:, None] * D + o_d[None, :], b_o, mask=m_q)
    tl.store(p_max + o_part, b_max, mask=o_g < G)
    tl.store(p_sum + o_part, b_sum, mask=o_g < G)


@triton.jit
def _merge_kernel(
    p_part, p_max, p_sum, p_o, o_b, o_h, SPLITS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_s = (i_b * H + i_h) * SPLITS + tl.arange(0, SPLITS)
    o_d = tl.arange(0, BD)
    b_max = tl.load(p_max + o_s)
    b_top = tl.maximum(tl.max(b_max, axis=0), -1e30)  # finite also where no split saw a key
    b_weight = tl.exp2(b_max - b_top)
    # [SPLITS, BD]
    b_part = tl.load(p_part + o_s[:, None] * D + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
    b_sum = tl.sum(b_weight * tl.load(p_sum + o_s), axis=0)
    b_o = tl.sum(b_weight[:, None] * b_part, axis=0) / tl.where(b_sum > 0.0, b_sum, 1.0)
    tl.store(p_o + i_b * o_b + i_h * o_h + o_d, b_o.to(p_o.dtype.element_ty), mask=o_d < D)


def decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """q, out [B, H, D], caches [num_blocks, block_size, H_kv, D]. Contract: `Kernels.attention_decode`.

    A row with context_lens = -1 sees nothing and writes zeros. The number of splits depends on the width of
    the block table alone, so a captured graph serves every length.
    """
    num_rows, num_heads, head_dim = q.shape
    if num_rows == 0:
        return out
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    _, BN, BD, precision = tile_sizes(head_dim, q.dtype)
    splits = min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(block_table.shape[1] * block_size, KEYS_PER_SPLIT)))
    part = torch.empty(num_rows, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
    top, total = torch.empty(2, num_rows, num_heads, splits, dtype=torch.float32, device=q.device)
    sizes = {"SPLITS": splits, "H": num_heads, "D": head_dim, "BD": BD}
    _split_kernel[(splits, num_kv_heads, num_rows)](
        q,
        key_cache,
        value_cache,
        block_table,
        context_lens,
        part,
        top,
        total,
        scale * math.log2(math.e),
        *q.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        **sizes,
        G=group,
        BLOCK_SIZE=block_size,
        BG=max(16, triton.next_power_of_2(group)),
        BN=BN,
        PRECISION=precision,
        num_warps=4,
        num_stages=2,
    )
    _merge_kernel[(num_heads, num_rows)](part, top, total, out, *out.stride()[:2], **sizes, num_warps=4)
    return out
