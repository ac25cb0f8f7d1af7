"""Causal softmax attention of rows of queries over their paged history (Dao et al. 2022 for the tiling)."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .tile import load_paged, online_softmax, tile_sizes


@triton.jit(do_not_specialize=["b_b"], do_not_specialize_on_alignment=["p_blocks", "p_start", "p_context"])
def _prefill_kernel(
    p_q,
    p_key,
    p_value,
    p_blocks,
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
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(p_start + i_b).to(tl.int64)
    n = (tl.load(p_start + i_b + 1) - first).to(tl.int32)
    if i_m * BM >= n:
        return
    context = tl.load(p_context + i_b)
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_q = (o_m < n)[:, None] & (o_d < D)[None, :]
    o_row = (first + o_m)[:, None]
    b_q = tl.load(p_q + o_row * q_t + i_h * q_h + o_d[None, :], mask=m_q, other=0.0)
    p_key += i_h // G * kc_h
    p_value += i_h // G * vc_h
    p_blocks += i_b.to(tl.int64) * b_b

    b_o = tl.zeros([BM, BD], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    length = context + tl.minimum(n, (i_m + 1) * BM)  # what the tile's last query sees
    for i_n in range(0, length, BN):
        o_n = i_n + tl.arange(0, BN)
        b_k = load_paged(p_key, p_blocks, o_n, length, kc_b, kc_t, BLOCK_SIZE, D, BD)
        b_v = load_paged(p_value, p_blocks, o_n, length, vc_b, vc_t, BLOCK_SIZE, D, BD)
        # [BM, BD] @ [BD, BN] -> [BM, BN]
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
        seen = (o_n[None, :] <= context + o_m[:, None]) & (o_n < length)[None, :]
        b_score = tl.where(seen, b_score, float("-inf"))
        b_o, b_max, b_sum = online_softmax(b_o, b_max, b_sum, b_score, b_v, PRECISION)
    b_o = b_o / b_sum[:, None]
    tl.store(p_o + o_row * o_t + i_h * o_h + o_d[None, :], b_o.to(p_o.dtype.element_ty), mask=m_q)


def prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    scale: float,
    out: Tensor,
) -> Tensor:
    """q, out [T, H, D], caches [num_blocks, block_size, H_kv, D]. Contract: `Kernels.attention_prefill`."""
    num_heads, head_dim = q.shape[1:]
    BM, BN, BD, precision = tile_sizes(head_dim, q.dtype)
    grid = (triton.cdiv(max_query_len, BM), num_heads, context_lens.shape[0])
    if 0 in grid:
        return out
    _prefill_kernel[grid](
        q,
        key_cache,
        value_cache,
        block_table,
        query_start_loc,
        context_lens,
        out,
        scale * math.log2(math.e),
        *q.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        *out.stride()[:2],
        G=num_heads // key_cache.shape[2],
        BLOCK_SIZE=key_cache.shape[1],
        D=head_dim,
        BM=BM,
        BN=BN,
        BD=BD,
        PRECISION=precision,
        num_warps=4,
        num_stages=2,
    )
    return out
