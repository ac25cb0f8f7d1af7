"""`replay`: decode that reads the state and seldom writes it; `fold`, which brings waiting tokens into the state.

The keys, corrections, decays and raw values of the last tokens wait in a ring per slot. With n of them, G_i the sums of
g since the last fold, G the sum with the new token's g, and w_i = e^{G - G_i},

    u = beta (v - e^G S k - sum_i w_i (k_i . k) u_i),   o = e^G S q + sum_i w_i (k_i . q) u_i + (q . k) u.

When the ring is full, S = e^G S + sum_i w_i u_i k_i^T + u k^T. So S is written, and rounded to the pool's dtype, once
per N tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from .contract import TAPS, DeltaInputs, DeltaRing, DeltaState, DeltaWeights
from .gates import decay_log, strength
from .tiles import head_counts, step_tiles
from .token import channels, convolved, state_tile, unit


@triton.jit
def _folded(b_s, p_key, p_u, p_g, last, count, K, V, i_v, BK: tl.constexpr, BV: tl.constexpr):
    """The state with the `count` waiting tokens, as it is when the sum of g is `last`."""
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    b_s *= tl.exp(last)
    for i in range(0, count):
        b_k = tl.load(p_key + i * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_u = tl.load(p_u + i * V + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        # [BV, 1] * [1, BK] -> [BV, BK]
        b_s += (b_u * tl.exp(last - tl.load(p_g + i)))[:, None] * b_k[None, :]
    return b_s


@triton.jit
def _keep_tail(p_tail, p_ring, position, count, o_c, m_c, C: tl.constexpr, TAPS: tl.constexpr):
    """Raw values of the last three of `count` tokens in the ring to their places; the token after them is at
    `position`."""
    for j in tl.static_range(1, TAPS):
        m_j = m_c & (count >= j)
        b_raw = tl.load(p_ring + (count - j) * C + o_c, mask=m_j, other=0.0)
        tl.store(p_tail + (position - j + TAPS) % TAPS * C + o_c, b_raw.to(p_tail.dtype.element_ty), mask=m_j)


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_contexts", "p_pending"])
def _replay_kernel(
    p_raw,
    p_step,
    p_strength,
    p_conv,
    p_decay,
    p_bias,
    p_state,
    p_tail,
    p_ring_key,
    p_ring_u,
    p_ring_g,
    p_ring_raw,
    p_pending,
    p_slots,
    p_continues,
    p_contexts,
    p_o,
    scale,
    raw_t,
    step_t,
    strength_t,
    state_n,
    tail_n,
    key_n,
    u_n,
    g_n,
    ring_raw_n,
    o_t,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TAPS: tl.constexpr,
    RING: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C: tl.constexpr = 2 * HK * K + HV * V
    i_k = i_h // (HV // HK)
    c_q, c_k, c_v, m_k, m_v = channels(i_k, i_h, i_v, K, V, HK, BK, BV)
    o_k, o_v, o_n = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, RING)
    p_o += i_b * o_t + i_h * V + o_v
    slot = tl.load(p_slots + i_b).to(tl.int64)
    if slot < 0:
        tl.store(p_o, tl.zeros([BV], p_o.dtype.element_ty), mask=m_v)
        return
    continues = tl.load(p_continues + i_b)
    position = tl.where(continues, tl.load(p_contexts + i_b), 0)
    count = tl.where(continues, tl.load(p_pending + i_b), 0)
    at, m_s = state_tile(slot, i_h, i_v, state_n, K, V, BK, BV)
    p_ring_key += slot * key_n + i_k * (RING * K)
    p_ring_u += slot * u_n + i_h * (RING * V)
    p_ring_g += slot * g_n + i_h * RING
    p_ring_raw += slot * ring_raw_n
    p_tail += slot * tail_n
    p_raw += i_b * raw_t
    # All loads before the first sum, which is a barrier.
    b_s = tl.load(p_state + at, mask=m_s & (position > count), other=0.0).to(tl.float32)
    m_n = o_n < count
    b_keys = tl.load(p_ring_key + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
    b_us = tl.load(p_ring_u + o_n[None, :] * V + o_v[:, None], mask=m_n[None, :] & m_v[:, None], other=0.0)
    b_sums = tl.load(p_ring_g + o_n, mask=m_n, other=0.0)
    before = tl.load(p_ring_g + count - 1, mask=count > 0, other=0.0)
    b_raw_q = tl.load(p_raw + c_q, mask=m_k, other=0.0)
    b_raw_k = tl.load(p_raw + c_k, mask=m_k, other=0.0)
    b_raw_v = tl.load(p_raw + c_v, mask=m_v, other=0.0)
    b_q = convolved(b_raw_q, p_tail, p_ring_raw, p_conv, position, count, c_q, m_k, C, TAPS)
    b_k = convolved(b_raw_k, p_tail, p_ring_raw, p_conv, position, count, c_k, m_k, C, TAPS)
    b_v = convolved(b_raw_v, p_tail, p_ring_raw, p_conv, position, count, c_v, m_v, C, TAPS)
    last = before + decay_log(p_step + i_b * step_t + i_h, p_decay + i_h, p_bias + i_h, True)
    b_beta = strength(p_strength + i_b * strength_t + i_h, True)
    b_q = unit(b_q) * scale
    b_k = unit(b_k).to(p_ring_key.dtype.element_ty).to(tl.float32)  # as the ring will have it
    b_d = tl.exp(last)
    b_w = tl.where(m_n, tl.exp(tl.minimum(last - b_sums, 0.0)), 0.0)
    # [RING, BK] * [1, BK] -> [RING]
    b_keys = b_keys.to(tl.float32)
    b_wk = tl.sum(b_keys * b_k[None, :], axis=1) * b_w
    b_wq = tl.sum(b_keys * b_q[None, :], axis=1) * b_w
    # [BV, BK] * [1, BK] -> [BV], [BV, RING] * [1, RING] -> [BV]
    b_us = b_us.to(tl.float32)
    b_u = b_v - tl.sum(b_s * (b_k * b_d)[None, :], axis=1) - tl.sum(b_us * b_wk[None, :], axis=1)
    b_u = (b_u * b_beta).to(p_ring_u.dtype.element_ty).to(tl.float32)
    b_o = tl.sum(b_s * (b_q * b_d)[None, :], axis=1) + tl.sum(b_us * b_wq[None, :], axis=1)
    b_o += tl.sum(b_q * b_k, axis=0) * b_u
    tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_v)

    m_own = m_k & (i_v == 0) & (i_h % (HV // HK) == 0)  # of the programs that share a key head, one writes
    if continues and count < RING - 1:
        tl.store(p_ring_key + count * K + o_k, b_k.to(p_ring_key.dtype.element_ty), mask=m_own)
        tl.store(p_ring_u + count * V + o_v, b_u.to(p_ring_u.dtype.element_ty), mask=m_v)
        if i_v == 0:
            tl.store(p_ring_g + count, last)
        p_new = p_ring_raw + count * C
    else:
        # Loaded anew, so that the common case need not keep it in registers.
        b_s = tl.load(p_state + at, mask=m_s & (position > count), other=0.0).to(tl.float32)
        b_s = _folded(b_s, p_ring_key, p_ring_u, p_ring_g, last, count, K, V, i_v, BK, BV)
        b_s += b_u[:, None] * b_k[None, :]
        tl.store(p_state + at, b_s.to(p_state.dtype.element_ty), mask=m_s)
        _keep_tail(p_tail, p_ring_raw, position, count, c_v, m_v, C, TAPS)
        _keep_tail(p_tail, p_ring_raw, position, count, c_q, m_own, C, TAPS)
        _keep_tail(p_tail, p_ring_raw, position, count, c_k, m_own, C, TAPS)
        p_new = p_tail + position % TAPS * C
    tl.store(p_new + c_v, b_raw_v.to(p_tail.dtype.element_ty), mask=m_v)
    tl.store(p_new + c_q, b_raw_q.to(p_tail.dtype.element_ty), mask=m_own)
    tl.store(p_new + c_k, b_raw_k.to(p_tail.dtype.element_ty), mask=m_own)


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_contexts", "p_pending"])
def _fold_kernel(
    p_state,
    p_tail,
    p_ring_key,
    p_ring_u,
    p_ring_g,
    p_ring_raw,
    p_pending,
    p_slots,
    p_contexts,
    state_n,
    tail_n,
    key_n,
    u_n,
    g_n,
    ring_raw_n,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TAPS: tl.constexpr,
    RING: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C: tl.constexpr = 2 * HK * K + HV * V
    i_k = i_h // (HV // HK)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    count = tl.load(p_pending + i_b)
    if slot < 0 or count == 0:
        return
    position = tl.load(p_contexts + i_b)
    c_q, c_k, c_v, m_k, m_v = channels(i_k, i_h, i_v, K, V, HK, BK, BV)
    at, m_s = state_tile(slot, i_h, i_v, state_n, K, V, BK, BV)
    p_ring_key += slot * key_n + i_k * (RING * K)
    p_ring_u += slot * u_n + i_h * (RING * V)
    p_ring_g += slot * g_n + i_h * RING
    p_ring_raw += slot * ring_raw_n
    p_tail += slot * tail_n
    b_s = tl.load(p_state + at, mask=m_s & (position > count), other=0.0).to(tl.float32)
    last = tl.load(p_ring_g + count - 1)
    b_s = _folded(b_s, p_ring_key, p_ring_u, p_ring_g, last, count, K, V, i_v, BK, BV)
    tl.store(p_state + at, b_s.to(p_state.dtype.element_ty), mask=m_s)
    m_own = m_k & (i_v == 0) & (i_h % (HV // HK) == 0)
    _keep_tail(p_tail, p_ring_raw, position, count, c_v, m_v, C, TAPS)
    _keep_tail(p_tail, p_ring_raw, position, count, c_q, m_own, C, TAPS)
    _keep_tail(p_tail, p_ring_raw, position, count, c_k, m_own, C, TAPS)


def replay(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    ring: DeltaRing,
    rows: Rows,
    context_lens: Tensor,
    out: Tensor,
) -> Tensor:
    """Contract: `Delta.replay`."""
    key_heads, num_heads, K, V = head_counts(inputs, pool)
    tiles = step_tiles(pool, num_rows=rows.slots.shape[0])
    grid = (triton.cdiv(V, tiles.BV), num_heads, rows.slots.shape[0])
    if 0 in grid:
        return out
    _replay_kernel[grid](
        *inputs,
        *weights,
        *pool,
        *ring,
        rows.slots,
        rows.continues,
        context_lens,
        out,
        K**-0.5,
        *(part.stride(0) for part in (*inputs, *pool, *ring[:-1], out)),
        HK=key_heads,
        HV=num_heads,
        K=K,
        V=V,
        TAPS=TAPS,
        RING=ring.key.shape[2],
        **tiles._asdict(),
    )
    return out


def fold(pool: DeltaState, ring: DeltaRing, slots: Tensor, context_lens: Tensor) -> None:
    """Contract: `Delta.fold`."""
    num_heads, V, K = pool.state.shape[1:]
    tiles = step_tiles(pool, num_rows=slots.shape[0])
    grid = (triton.cdiv(V, tiles.BV), num_heads, slots.shape[0])
    if 0 in grid:
        return
    _fold_kernel[grid](
        *pool,
        *ring,
        slots,
        context_lens,
        *(part.stride(0) for part in (*pool, *ring[:-1])),
        HK=ring.key.shape[1],
        HV=num_heads,
        K=K,
        V=V,
        TAPS=TAPS,
        RING=ring.key.shape[2],
        **tiles._asdict(),
    )
