"""Decode: one token per row, the state read and written once.

A program owns one V tile of one head of one row. Formulas: `lightning/reference.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from .tile import load_state, state_pointers, step_tiles, token_step


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues"])
def _decode_kernel(
    p_q,
    p_k,
    p_v,
    p_slopes,
    p_state,
    p_slots,
    p_continues,
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
    s_k: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_o += i_b * o_t + i_h * o_h
    slot = tl.load(p_slots + i_b)
    if slot < 0:
        o_v = i_v * BV + tl.arange(0, BV)
        tl.store(p_o + o_v, tl.zeros([BV], p_o.dtype.element_ty), mask=o_v < V)
        return
    p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    b_s = load_state(p_s, m_s, tl.load(p_continues + i_b), BK, BV)
    b_s = token_step(
        p_q + i_b * q_t + i_h * q_h,
        p_k + i_b * k_t + i_h * k_h,
        p_v + i_b * v_t + i_h * v_h,
        p_o,
        b_s,
        tl.load(p_slopes + i_h),
        scale,
        i_v,
        K,
        V,
        BK,
        BV,
    )
    tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_s)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """Contract: `Lightning.decode`."""
    num_heads, head_dim = q.shape[1:]
    value_dim = v.shape[2]
    tiles = step_tiles(q, v, BV=64, num_warps=4)
    grid = (triton.cdiv(value_dim, tiles.BV), num_heads, rows.slots.shape[0])
    if 0 in grid:
        return out
    _decode_kernel[grid](
        q,
        k,
        v,
        slopes,
        state,
        rows.slots,
        rows.continues,
        out,
        scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        *state.stride()[:3],
        K=head_dim,
        V=value_dim,
        **tiles._asdict(),
    )
    return out
