"""`verify`: a few tokens at once, of which perhaps only the first will be kept, so the state is only read.

All of a row's m tokens but the first are drafts. They read the state and the p keys and values that wait in the slot's
ring, and leave their own keys and values behind them. With a = 1..m,

    o_a = scale * ( e^{-s(p+a)} q_a S + sum_{i<p} e^{-s(p+a-1-i)} (q_a . k_i) v_i
                    + sum_{b<=a} e^{-s(a-b)} (q_a . k_b) v_b ).

The caller's next count of waiting tokens says how many are kept; later ones are overwritten. No state is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Ring, Rows
from .tile import (
    Tiles,
    load_ring,
    load_rows,
    load_state,
    padded,
    state_pointers,
    store_rows,
    walk_tiles,
)


@triton.jit
def _weights(b_q, b_k, lag, slope, PRECISION: tl.constexpr):
    """Decayed scores [BT, BT] of queries [BT, BK] with keys [BT, BK] that are `lag` tokens back; 0 where lag < 0."""
    # [BT, BK] @ [BK, BT] -> [BT, BT]
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    return tl.where(lag >= 0, b_score * tl.exp(-slope * tl.maximum(lag, 0)), 0.0)


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_pending", "p_start"])
def _verify_kernel(
    p_q,
    p_k,
    p_v,
    p_slopes,
    p_state,
    p_key_ring,
    p_value_ring,
    p_slots,
    p_continues,
    p_pending,
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
    rk_n,
    rv_n,
    K: tl.constexpr,
    V: tl.constexpr,
    RING: tl.constexpr,
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
    p_o += first * o_t + i_h * o_h
    slot = tl.load(p_slots + i_b).to(tl.int64)
    if slot < 0:
        for start in range(0, n, BT):  # padding may be longer than any row
            store_rows(p_o, tl.zeros([BT, BV], tl.float32), start, n, i_v, o_t, V, BT, BV)
        return
    continues = tl.load(p_continues + i_b)
    count = tl.where(continues, tl.load(p_pending + i_b), 0)
    slope = tl.load(p_slopes + i_h)
    p_key_ring += slot * rk_n + i_h * RING * K
    p_value_ring += slot * rv_n + i_h * RING * V
    p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    # All loads before the first sum, which is a barrier.
    b_s = load_state(p_s, m_s, continues, BK, BV)
    b_q = load_rows(p_q + first * q_t + i_h * q_h, 0, n, 0, q_t, K, BT, BK)
    b_k = load_rows(p_k + first * k_t + i_h * k_h, 0, n, 0, k_t, K, BT, BK)
    b_v = load_rows(p_v + first * v_t + i_h * v_h, 0, n, i_v, v_t, V, BT, BV)
    b_keys = load_ring(p_key_ring, 0, count, K, BT, BK)
    b_values = load_ring(p_value_ring, i_v, count, V, BT, BV)

    a = tl.arange(0, BT)
    lag = a[:, None] - a[None, :]
    # [BT, BK] @ [BK, BV] -> [BT, BV]
    b_o = tl.dot(b_q.to(DOT), b_s.to(DOT), input_precision=PRECISION) * tl.exp(-slope * (count + a + 1))[:, None]
    b_weight = _weights(b_q, b_keys.to(b_q.dtype), count + lag, slope, PRECISION)
    # [BT, BT] @ [BT, BV] -> [BT, BV]
    b_o = tl.dot(b_weight.to(DOT), b_values.to(DOT), b_o, input_precision=PRECISION)
    b_weight = _weights(b_q, b_k, lag, slope, PRECISION)
    # [BT, BT] @ [BT, BV] -> [BT, BV]
    b_o = tl.dot(b_weight.to(DOT), b_v.to(DOT), b_o, input_precision=PRECISION)
    store_rows(p_o, b_o * scale, 0, n, i_v, o_t, V, BT, BV)

    # No program of this launch reads places from `count` on; other value tiles may still read those before.
    if i_v == 0:  # a tile of values each, the keys once
        store_rows(p_key_ring + count * K, b_k, 0, n, 0, K, K, BT, BK)
    store_rows(p_value_ring + count * V, b_v, 0, n, i_v, V, V, BT, BV)


def _verify_tiles(q: Tensor, v: Tensor, ring_size: int) -> Tiles:
    """One block of tokens holds a ring. Without a loop stages do not count. Full float32 spills with four warps."""
    num_warps = 8 if q.dtype == torch.float32 else 4
    return walk_tiles(q, v, num_walks=1)._replace(BT=padded(ring_size), num_warps=num_warps, num_stages=2)


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    ring: Ring,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """Contract: `Lightning.verify`."""
    num_heads, head_dim = q.shape[1:]
    value_dim, ring_size = v.shape[2], ring.key.shape[2]
    tiles = _verify_tiles(q, v, ring_size)
    grid = (triton.cdiv(value_dim, tiles.BV), num_heads, rows.slots.shape[0])
    if 0 in grid:
        return out
    _verify_kernel[grid](
        q,
        k,
        v,
        slopes,
        state,
        ring.key,
        ring.value,
        rows.slots,
        rows.continues,
        ring.num_pending,
        rows.starts,
        out,
        scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        *state.stride()[:3],
        ring.key.stride(0),
        ring.value.stride(0),
        K=head_dim,
        V=value_dim,
        RING=ring_size,
        **tiles._asdict(),
    )
    return out
