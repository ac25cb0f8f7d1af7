"""`verify`: a few tokens at once, of which perhaps only the first will be kept, so the state is only read.

All of a row's m tokens but the first are drafts. With G the sum of g of the tokens that wait since the last fold, c the
sums of the new ones, and D_ab = e^{c_a - c_b},

    R_a = e^{G + c_a} S k_a + sum_i e^{G + c_a - G_i} (k_i . k_a) u_i
    (I + L) U = diag(beta) (V - R),   L = strictly lower(beta_a (k_a . k_b) D_ab)

and o_a the same sums with q_a in place of k_a, plus sum_{b <= a} (q_a . k_b) D_ab u_b. A correction depends on no later
token, so the caller's next count of waiting tokens is all that tells which are kept. No state is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from ..lightning.tile import num_processors, padded
from .contract import TAPS, DeltaInputs, DeltaRing, DeltaState, DeltaWeights
from .gates import decay_log, strength
from .tiles import head_counts
from .token import channels, state_tile


@triton.jit
def _convolved(
    p_raw,
    p_ring,
    p_tail,
    p_conv,
    context,
    count,
    n,
    raw_t,
    o_c,
    m_c,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BT: tl.constexpr,
):
    """silu of the convolution at channels o_c of a row's n tokens, [BT, BC] float32, and their raw values."""
    o = tl.arange(0, BT)
    b_x = tl.zeros_like(o[:, None] + o_c[None, :]).to(tl.float32)
    for j in tl.static_range(TAPS):
        t = o - j  # counted from the row's first token; those before it wait in the ring, those before these do not
        p_old = tl.where(count + t >= 0, p_ring + (count + t) * C, p_tail + (context + t + TAPS) % TAPS * C)
        p_token = tl.where(t >= 0, p_raw + t * raw_t, p_old)
        mask = ((o < n) & (context + t >= 0))[:, None] & m_c[None, :]
        b_raw = tl.load(p_token[:, None] + o_c[None, :], mask=mask, other=0.0)
        b_x += b_raw.to(tl.float32) * tl.load(p_conv + (TAPS - 1 - j) * C + o_c, mask=m_c, other=0.0)[None, :]
    b_raw = tl.load(p_raw + o[:, None] * raw_t + o_c[None, :], mask=(o < n)[:, None] & m_c[None, :], other=0.0)
    return b_x * tl.sigmoid(b_x), b_raw


@triton.jit
def _unit(b_x):
    """Rows of b_x [BT, BK] of length 1."""
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=1) + 1e-6)[:, None]


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_contexts", "p_pending", "p_starts"])
def _verify_kernel(
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
    p_starts,
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
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C: tl.constexpr = 2 * HK * K + HV * V
    i_k = i_h // (HV // HK)
    c_q, c_k, c_v, m_k, m_v = channels(i_k, i_h, i_v, K, V, HK, BK, BV)
    o, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    start = tl.load(p_starts + i_b).to(tl.int64)
    n = (tl.load(p_starts + i_b + 1) - start).to(tl.int32)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    p_o += start * o_t + i_h * V
    if slot < 0:
        for t in range(0, n, BT):
            p_zero = p_o + (t + o)[:, None].to(tl.int64) * o_t + o_v[None, :]
            tl.store(p_zero, tl.zeros([BT, BV], p_o.dtype.element_ty), mask=(o < n - t)[:, None] & m_v[None, :])
        return
    continues = tl.load(p_continues + i_b)
    context = tl.where(continues, tl.load(p_contexts + i_b), 0)
    count = tl.where(continues, tl.load(p_pending + i_b), 0)
    p_ring_key += slot * key_n + i_k * (BT * K)
    p_ring_u += slot * u_n + i_h * (BT * V)
    p_ring_g += slot * g_n + i_h * BT
    p_ring_raw += slot * ring_raw_n
    p_tail += slot * tail_n
    p_raw += start * raw_t
    m, m_n = o < n, o < count
    at, m_s = state_tile(slot, i_h, i_v, state_n, K, V, BK, BV)
    b_s = tl.load(p_state + at, mask=m_s & (context > count), other=0.0).to(tl.float32)
    b_keys = tl.load(p_ring_key + o[:, None] * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
    b_us = tl.load(p_ring_u + o[:, None] * V + o_v[None, :], mask=m_n[:, None] & m_v[None, :], other=0.0)
    b_sums = tl.load(p_ring_g + o, mask=m_n, other=0.0)
    before = tl.load(p_ring_g + count - 1, mask=count > 0, other=0.0)
    b_q, b_raw_q = _convolved(p_raw, p_ring_raw, p_tail, p_conv, context, count, n, raw_t, c_q, m_k, C, TAPS, BT)
    b_k, b_raw_k = _convolved(p_raw, p_ring_raw, p_tail, p_conv, context, count, n, raw_t, c_k, m_k, C, TAPS, BT)
    b_v, b_raw_v = _convolved(p_raw, p_ring_raw, p_tail, p_conv, context, count, n, raw_t, c_v, m_v, C, TAPS, BT)
    b_q = _unit(b_q) * scale
    b_low = _unit(b_k).to(p_ring_key.dtype.element_ty)  # as the ring will have it
    b_k = b_low.to(tl.float32)
    b_g = decay_log(p_step + (start + o) * step_t + i_h, p_decay + i_h, p_bias + i_h, m)
    b_beta = strength(p_strength + (start + o) * strength_t + i_h, m)
    b_c = before + tl.cumsum(b_g, axis=0)
    b_in = tl.exp(b_c)[:, None]
    # Scores of the tokens with those that wait, and with each other: [BT, BK] @ [BK, BT] -> [BT, BT]
    b_old = tl.where(m_n[None, :], tl.exp(tl.minimum(b_c[:, None] - b_sums[None, :], 0.0)), 0.0)
    b_new = tl.exp(tl.minimum(b_c[:, None] - b_c[None, :], 0.0))
    b_keys = tl.trans(b_keys.to(tl.float32))
    b_ko = tl.dot(b_k, b_keys, input_precision=PRECISION) * b_old
    b_qo = tl.dot(b_q, b_keys, input_precision=PRECISION) * b_old
    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_new * b_beta[:, None]
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_new
    b_kk = tl.where(o[:, None] > o[None, :], b_kk, 0.0)
    b_qk = tl.where(o[:, None] >= o[None, :], b_qk, 0.0)
    # [BT, BK] @ [BK, BV] -> [BT, BV], [BT, BT] @ [BT, BV] -> [BT, BV]
    b_us = b_us.to(tl.float32)
    b_s = tl.trans(b_s)
    b_r = tl.dot(b_ko, b_us, tl.dot(b_k, b_s, input_precision=PRECISION) * b_in, input_precision=PRECISION)
    b_o = tl.dot(b_qo, b_us, tl.dot(b_q, b_s, input_precision=PRECISION) * b_in, input_precision=PRECISION)
    b_u = (b_v - b_r) * b_beta[:, None]
    for r in range(1, n):  # row r's correction looks at the corrections of the rows before it
        b_row = tl.sum(tl.where(o[:, None] == r, b_kk, 0.0), axis=0)
        b_seen = tl.sum(tl.where((o < r)[:, None], b_u, 0.0) * b_row[:, None], axis=0)
        b_u = tl.where(o[:, None] == r, b_u - b_seen[None, :], b_u)
    b_low_u = b_u.to(p_ring_u.dtype.element_ty)
    b_o = tl.dot(b_qk, b_low_u.to(tl.float32), b_o, input_precision=PRECISION)
    tl.store(p_o + o[:, None] * o_t + o_v[None, :], b_o.to(p_o.dtype.element_ty), mask=m[:, None] & m_v[None, :])

    place = (count + o)[:, None]
    m_own = (m_k & (i_v == 0) & (i_h % (HV // HK) == 0))[None, :] & m[:, None]  # one program per key head
    tl.store(p_ring_key + place * K + o_k[None, :], b_low, mask=m_own)
    tl.store(p_ring_u + place * V + o_v[None, :], b_low_u, mask=m[:, None] & m_v[None, :])
    tl.store(p_ring_g + count + o, b_c, mask=m & (i_v == 0))
    p_ring_raw += place * C
    tl.store(p_ring_raw + c_q[None, :], b_raw_q.to(p_ring_raw.dtype.element_ty), mask=m_own)
    tl.store(p_ring_raw + c_k[None, :], b_raw_k.to(p_ring_raw.dtype.element_ty), mask=m_own)
    tl.store(p_ring_raw + c_v[None, :], b_raw_v.to(p_ring_raw.dtype.element_ty), mask=m[:, None] & m_v[None, :])


def verify(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    ring: DeltaRing,
    rows: Rows,
    context_lens: Tensor,
    out: Tensor,
) -> Tensor:
    """Contract: `Delta.verify`."""
    key_heads, num_heads, K, V = head_counts(inputs, pool)
    is_wide = rows.slots.shape[0] * num_heads >= 2 * num_processors(out.device)
    BV = min(padded(V), 128 if is_wide else 32)
    grid = (triton.cdiv(V, BV), num_heads, rows.slots.shape[0])
    if 0 in grid:
        return out
    _verify_kernel[grid](
        *inputs,
        *weights,
        *pool,
        *ring,
        rows.slots,
        rows.continues,
        context_lens,
        rows.starts,
        out,
        K**-0.5,
        *(part.stride(0) for part in (*inputs, *pool, *ring[:-1], out)),
        HK=key_heads,
        HV=num_heads,
        K=K,
        V=V,
        TAPS=TAPS,
        BT=ring.key.shape[2],
        BK=padded(K),
        BV=BV,
        PRECISION="ieee" if inputs.raw.dtype == torch.float32 else "tf32",
        num_warps=8 if is_wide else 4,
    )
    return out
