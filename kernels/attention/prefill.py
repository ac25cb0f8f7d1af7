"""Causal softmax attention of rows of queries over their paged history (Dao et al. 2022 for the tiling).

A tile is BM pairs of (token, query head), token after token, all of one kv head: the heads that share keys share
their loads, and a row of few tokens still fills its tile.
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


@triton.jit(do_not_specialize=["b_b"], do_not_specialize_on_alignment=["p_rows", "p_start", "p_context"])
def _prefill_kernel(
    p_q,
    p_key,
    p_value,
    p_blocks,
    p_rows,
    p_start,
    p_context,
    p_o,
    scale_log2,
    q_t,
    q_h,
    kc_b,
    kc_t,
    kc_h,
    vc_b,
    vc_t,
    vc_h,
    b_b,
    o_t,
    o_h,
    G: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_kv, i_b = tl.program_id(1), tl.program_id(2)
    first = tl.load(p_start + i_b).to(tl.int64)
    n = (tl.load(p_start + i_b + 1) - first).to(tl.int32)
    i_m = tl.cdiv(n * G, BM) - 1 - tl.program_id(0)  # the last tile sees the most keys, so it goes first
    if i_m < 0:
        return
    context = tl.load(p_context + i_b)
    p_key += i_kv * kc_h
    p_value += i_kv * vc_h
    p_blocks += tl.load(p_rows + i_b).to(tl.int64) * b_b
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    i_token = o_m // G
    o_h_q = i_kv * G + o_m % G
    m_q = (i_token < n)[:, None] & (o_d < D)[None, :]
    p_out = p_o + ((first + i_token) * o_t + o_h_q * o_h)[:, None] + o_d[None, :]
    if context < 0:  # padding row
        tl.store(p_out, tl.zeros([BM, BD], p_o.dtype.element_ty), mask=m_q)
        return
    b_q = tl.load(p_q + ((first + i_token) * q_t + o_h_q * q_h)[:, None] + o_d[None, :], mask=m_q, other=0.0)

    b_o = tl.zeros([BM, BD], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_position = context + i_token
    seen_by_all = (context + i_m * BM // G + 1) // BN * BN
    length = context + tl.minimum(n, ((i_m + 1) * BM - 1) // G + 1)  # positions that the tile's last query sees
    b_first = load_blocks(p_blocks, 0, length, BLOCK_SIZE, BN)
    b_tail = load_blocks(p_blocks, seen_by_all, length, BLOCK_SIZE, BN)
    for TAIL in tl.static_range(2):  # two loops: keys that every query of the tile sees need no mask
        b_block = b_tail if TAIL else b_first
        for i_n in range(seen_by_all if TAIL else 0, length if TAIL else seen_by_all, BN):
            b_k = load_tokens(p_key, b_block, i_n, length, kc_b, kc_t, False, BLOCK_SIZE, D, BN, BD)
            b_v = load_tokens(p_value, b_block, i_n, length, vc_b, vc_t, TAIL == 1, BLOCK_SIZE, D, BN, BD)
            b_block = load_blocks(p_blocks, i_n + BN, length, BLOCK_SIZE, BN)
            # [BM, BD] @ [BD, BN] -> [BM, BN]
            b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            if TAIL:
                o_n = i_n + tl.arange(0, BN)
                b_score = tl.where(o_n[None, :] <= b_position[:, None], b_score, float("-inf"))
            b_o, b_max, b_sum = online_softmax(b_o, b_max, b_sum, b_score, b_v, scale_log2, PRECISION)
    b_o = b_o / b_sum[:, None]
    tl.store(p_out, b_o.to(p_o.dtype.element_ty), mask=m_q)


def tile_options(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tiles that fit the registers of an H100 without spilling."""
    if dtype == torch.float32:
        return {"BM": 32, "BN": 16, "PRECISION": "ieee", "num_warps": 8, "num_stages": 2}
    BN = 64 if head_dim <= 128 else 32
    return {"BM": 128, "BN": BN, "PRECISION": "tf32", "num_warps": 8, "num_stages": 3}


def prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    rows: Rows,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """q, out [T, H, D], caches [num_blocks, block_size, H_kv, D]. Contract: `Attention.prefill`."""
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    options = tile_options(head_dim, q.dtype)
    grid = (triton.cdiv(rows.max_len * group, options["BM"]), num_kv_heads, context_lens.shape[0])
    if 0 in grid:
        return out
    _prefill_kernel[grid](
        q,
        key_cache,
        value_cache,
        block_table,
        rows.slots,
        rows.starts,
        context_lens,
        out,
        scale * math.log2(math.e),
        *q.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        *out.stride()[:2],
        G=group,
        BLOCK_SIZE=block_size,
        D=head_dim,
        BD=max(16, triton.next_power_of_2(head_dim)),
        **options,
    )
    return out
