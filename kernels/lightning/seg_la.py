"""`seg_la`: one launch walks every row, prefill and decode alike, with the state tile in registers.

A program owns one V tile of one head of one row, so a tile of the state is read and written once, however long the row
is. Formulas: `lightning/reference.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from .decode import decode
from .tile import load_state, state_pointers, store_rows, token_step, walk, walk_tiles


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
    q_t: tl.constexpr,
    q_h,
    k_t: tl.constexpr,
    k_h,
    v_t: tl.constexpr,
    v_h,
    o_t: tl.constexpr,
    o_h,
    s_n,
    s_h,
    s_k: tl.constexpr,
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
        for start in range(0, n, BT):
            store_rows(p_o, tl.zeros([BT, BV], tl.float32), start, n, i_v, o_t, V, BT, BV)
        return

    slope = tl.load(p_slopes + i_h)
    p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    b_s = load_state(p_s, m_s, tl.load(p_continues + i_b), BK, BV)
    if n == 1:
        b_s = token_step(p_q, p_k, p_v, p_o, b_s, slope, scale, i_v, K, V, BK, BV)
    else:
        b_s = walk(p_q, p_k, p_v, p_o, b_s, slope, scale, n, i_v, q_t, k_t, v_t, o_t, K, V, BT, BK, BV, DOT, PRECISION)
    tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_s)


def seg_la(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """Contract: `Lightning.seg_la`. A batch of single tokens takes the decode kernel, which needs no dots."""
    if rows.max_len == 1 and q.shape[0] == rows.slots.shape[0]:
        return decode(q, k, v, slopes, scale, state, rows, out)
    num_heads, head_dim = q.shape[1:]
    value_dim = v.shape[2]
    tiles = walk_tiles(q, v, rows.slots.shape[0])
    grid = (triton.cdiv(value_dim, tiles.BV), num_heads, rows.slots.shape[0])
    if 0 in grid:
        return out
    _segment_kernel[grid](
        q,
        k,
        v,
        slopes,
        state,
        rows.slots,
        rows.continues,
        rows.starts,
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
    )
    return out
