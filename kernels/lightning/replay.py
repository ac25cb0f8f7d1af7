"""`replay`: decode that reads the state and seldom writes it.

The keys and values of the last tokens wait in a ring per slot. A step reads the state once, replays the ring on top of
it, and appends one token. With j tokens waiting,

    o = scale * ( e^{-s(j+1)} q S + sum_{i<j} e^{-s(j-i)} (q . k_i) v_i + (q . k) v ).

When the ring is full its tokens are folded into S. So S is rounded to the pool's dtype once per C tokens instead of
once per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Ring, Rows
from .tile import decay_minus_one, load_ring, load_state, state_pointers, step_tiles


@triton.jit
def _load_channels(p_x, i_c, C, BC: tl.constexpr):
    """Channels i_c * BC.. of one token, [BC] float32."""
    o_c = i_c * BC + tl.arange(0, BC)
    return tl.load(p_x + o_c, mask=o_c < C, other=0.0).to(tl.float32)


@triton.jit
def _fold(b_s, p_key_ring, p_value_ring, count, slope, i_v, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """The state after the `count` waiting tokens, oldest first."""
    decay = decay_minus_one(slope)
    for i in range(0, count):
        b_k = _load_channels(p_key_ring + i * K, 0, K, BK)
        b_v = _load_channels(p_value_ring + i * V, i_v, V, BV)
        # [BK, 1] * [1, BV] -> [BK, BV]
        b_s += b_s * decay + b_k[:, None] * b_v[None, :]
    return b_s


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_pending"])
def _replay_kernel(
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
    rk_n,
    rv_n,
    K: tl.constexpr,
    V: tl.constexpr,
    RING: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    p_o += i_b * o_t + i_h * o_h
    slot = tl.load(p_slots + i_b).to(tl.int64)
    if slot < 0:
        tl.store(p_o + o_v, tl.zeros([BV], p_o.dtype.element_ty), mask=o_v < V)
        return
    continues = tl.load(p_continues + i_b)
    count = tl.where(continues, tl.load(p_pending + i_b), 0)
    slope = tl.load(p_slopes + i_h)
    p_key_ring += slot * rk_n + i_h * RING * K
    p_value_ring += slot * rv_n + i_h * RING * V
    p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    # All loads before the first sum, which is a barrier.
    b_s = load_state(p_s, m_s, continues, BK, BV)
    b_keys = load_ring(p_key_ring, 0, count, K, RING, BK)
    b_values = load_ring(p_value_ring, i_v, count, V, RING, BV)
    b_q = _load_channels(p_q + i_b * q_t + i_h * q_h, 0, K, BK)
    b_k = _load_channels(p_k + i_b * k_t + i_h * k_h, 0, K, BK)
    b_v = _load_channels(p_v + i_b * v_t + i_h * v_h, i_v, V, BV)

    # [BK, 1] * [BK, BV] -> [BV]
    b_o = tl.sum(b_q[:, None] * b_s, axis=0) * tl.exp(-slope * (count + 1))
    # [1, BK] * [RING, BK] -> [RING]
    age = tl.maximum(count - tl.arange(0, RING), 0)
    b_weight = tl.sum(b_q[None, :] * b_keys.to(tl.float32), axis=1) * tl.exp(-slope * age)
    b_o += tl.sum(b_weight[:, None] * b_values.to(tl.float32), axis=0)
    b_o += tl.sum(b_q * b_k, axis=0) * b_v
    tl.store(p_o + o_v, (b_o * scale).to(p_o.dtype.element_ty), mask=o_v < V)

    if continues and count < RING - 1:
        if i_v == 0:  # a tile of values each, the key once
            tl.store(p_key_ring + count * K + o_k, b_k.to(p_key_ring.dtype.element_ty), mask=o_k < K)
        tl.store(p_value_ring + count * V + o_v, b_v.to(p_value_ring.dtype.element_ty), mask=o_v < V)
    else:
        # Loaded anew, so that the common case need not keep it in registers.
        b_s = load_state(p_s, m_s, continues, BK, BV)
        b_s = _fold(b_s, p_key_ring, p_value_ring, count, slope, i_v, K, V, BK, BV)
        b_s += b_s * decay_minus_one(slope) + b_k[:, None] * b_v[None, :]
        tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_s)


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_pending"])
def _fold_kernel(
    p_slopes,
    p_state,
    p_key_ring,
    p_value_ring,
    p_slots,
    p_pending,
    s_n,
    s_h,
    s_k: tl.constexpr,
    rk_n,
    rv_n,
    K: tl.constexpr,
    V: tl.constexpr,
    RING: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    count = tl.load(p_pending + i_b)
    if slot < 0:
        return
    if count == 0:
        return
    p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    b_s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
    p_key_ring += slot * rk_n + i_h * RING * K
    p_value_ring += slot * rv_n + i_h * RING * V
    b_s = _fold(b_s, p_key_ring, p_value_ring, count, tl.load(p_slopes + i_h), i_v, K, V, BK, BV)
    tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_s)


def replay(
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
    """Contract: `Lightning.replay`."""
    num_heads, head_dim = q.shape[1:]
    value_dim = v.shape[2]
    tiles = step_tiles(q, v, BV=32, num_warps=2 if state.dtype == torch.float32 else 1)
    grid = (triton.cdiv(value_dim, tiles.BV), num_heads, rows.slots.shape[0])
    if 0 in grid:
        return out
    _replay_kernel[grid](
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
        RING=ring.key.shape[2],
        **tiles._asdict(),
    )
    return out


def fold(
    slopes: Tensor,
    state: Tensor,
    ring: Ring,
    slots: Tensor,
) -> None:
    """Contract: `Lightning.fold`."""
    num_heads, head_dim, value_dim = state.shape[1:]
    tiles = step_tiles(ring.key[:, :, 0], ring.value[:, :, 0], BV=64, num_warps=4)
    grid = (triton.cdiv(value_dim, tiles.BV), num_heads, slots.shape[0])
    if 0 in grid:
        return
    _fold_kernel[grid](
        slopes,
        state,
        ring.key,
        ring.value,
        slots,
        ring.num_pending,
        *state.stride()[:3],
        ring.key.stride(0),
        ring.value.stride(0),
        K=head_dim,
        V=value_dim,
        RING=ring.key.shape[2],
        **tiles._asdict(),
    )
