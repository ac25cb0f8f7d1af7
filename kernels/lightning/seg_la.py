"""`seg_la`: one launch walks every row, prefill and decode alike, with the state tile in registers.

A program owns one V tile of one head of one row, so a tile of the state is read and written once however long
the row is. Formulas: `lightning/reference.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tile import load_rows, load_state, state_pointers, store_rows, tiles_for, token_step


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_start"])
def _segment_kernel(
    p_q,
    p_k,
    p_v,
    p_slopes,
    p_state,
    p_slots,
    p_continues,
    p_start,
    p_o,
    scale,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    o_t,
    o_h,
    s_n,
    s_h,
    s_k,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(p_start + i_b).to(tl.int64)
    n = (tl.load(p_start + i_b + 1) - first).to(tl.int32)
    if n == 0:
        return
    p_q += first * q_t + i_h * q_h
    p_k += first * k_t + i_h * k_h
    p_v += first * v_t + i_h * v_h
    p_o += first * o_t + i_h * o_h
    slot = tl.load(p_slots + i_b)
    if slot < 0:
        for i_t in range(0, n, BT):
            store_rows(p_o, tl.zeros([BT, BV], tl.float32), i_t, n, i_v, o_t, V, BT, BV)
        return

    slope = tl.load(p_slopes + i_h)
    p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    b_s = load_state(p_s, m_s, tl.load(p_continues + i_b), BK, BV)
    if n == 1:
        b_s = token_step(p_q, p_k, p_v, p_o, b_s, slope, scale, i_v, K, V, BK, BV)
    else:
        a = tl.arange(0, BT)
        lag = a[:, None] - a[None, :]
        b_decay = tl.where(lag >= 0, tl.exp(-slope * tl.maximum(lag, 0)) * scale, 0.0)  # [BT, BT]
        b_in = tl.exp(-slope * (a + 1)) * scale
        for i_t in range(0, n, BT):
            m = tl.minimum(n - i_t, BT)
            b_q = load_rows(p_q, i_t, n, 0, q_t, K, BT, BK)
            b_k = load_rows(p_k, i_t, n, 0, k_t, K, BT, BK)
            b_v = load_rows(p_v, i_t, n, i_v, v_t, V, BT, BV)
            # [BT, BK] @ [BK, BT] -> [BT, BT]
            b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_decay
            # [BT, BK] @ [BK, BV] -> [BT, BV]
            b_o = tl.dot(b_q.to(DOT), b_s.to(DOT), input_precision=PRECISION) * b_in[:, None]
            # [BT, BT] @ [BT, BV] -> [BT, BV]
            b_o += tl.dot(b_score.to(b_v.dtype), b_v, input_precision=PRECISION)
            store_rows(p_o, b_o, i_t, n, i_v, o_t, V, BT, BV)
            b_out = tl.exp(-slope * tl.maximum(m - 1 - a, 0))
            # [BK, BT] @ [BT, BV] -> [BK, BV]
            b_kv = tl.dot(tl.trans(b_k), (b_v * b_out[:, None]).to(b_v.dtype), input_precision=PRECISION)
            b_s = b_s * tl.exp(-slope * m) + b_kv
    tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_s)


def segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    state_indices: Tensor,
    has_initial_state: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    out: Tensor,
) -> Tensor:
    """Contract: `Kernels.lightning_segments`."""
    num_heads, head_dim = q.shape[1:]
    value_dim = v.shape[2]
    tiles = tiles_for(q, v)
    grid = (triton.cdiv(value_dim, tiles.BV), num_heads, state_indices.shape[0])
    if 0 in grid:
        return out
    _segment_kernel[grid](
        q,
        k,
        v,
        slopes,
        state,
        state_indices,
        has_initial_state,
        query_start_loc,
        out,
        scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        *state.stride()[:3],
        head_dim,
        value_dim,
        **tiles._asdict(),
        num_warps=4,
        num_stages=2,
    )
    return out
