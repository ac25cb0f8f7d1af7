"""First launch of `verify`: all of a row's tokens that needs no state, once per row and value head.

Of each token a the launch keeps its query, key and value after the convolution, c_a, and rows of four matrices
[tokens, N]: A = (I + L)^{-1} diag(beta), the scores of its query with the row's tokens, and those of its key and its
query with the tokens that wait in the ring. It appends keys, decays and raw values to the ring. `verify.py` has the
formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from ..lightning.tile import num_processors, padded
from .contract import TAPS, DeltaInputs, DeltaRing, DeltaState, DeltaWeights
from .gates import decay_log, strength


class Prepared(NamedTuple):
    """All float32. `inverse` is A, `score` the queries' scores with the row's tokens."""

    x: Tensor  # [T, C], queries of length 1 / sqrt(K), keys of length 1 as the ring has them, values
    decay: Tensor  # [T, Hv], the sum of g since the last fold, the token's own included
    inverse: Tensor  # [T, Hv, N]
    score: Tensor  # [T, Hv, N]
    old_key: Tensor  # [T, Hv, N], times e^{G + c_a - G_i}
    old_query: Tensor  # [T, Hv, N], likewise


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


@triton.jit
def _inverse(b_l, n, BT: tl.constexpr):
    """b_l [BT, BT] float32, strictly lower -> (I + b_l)^{-1}, row after row up to row n."""
    o = tl.arange(0, BT)
    b_t = tl.trans(b_l)
    b_x = (o[:, None] == o[None, :]).to(tl.float32)
    for r in range(1, n):
        b_row = tl.sum(tl.where((o == r)[None, :], b_t, 0.0), axis=1)
        b_new = (o == r).to(tl.float32) - tl.sum(b_row[:, None] * b_x, axis=0)
        b_x = tl.where((o == r)[:, None], b_new[None, :], b_x)
    return b_x


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_contexts", "p_pending", "p_starts"])
def _prepare_kernel(
    p_raw,
    p_step,
    p_strength,
    p_conv,
    p_decay,
    p_bias,
    p_tail,
    p_ring_key,
    p_ring_g,
    p_ring_raw,
    p_pending,
    p_slots,
    p_continues,
    p_contexts,
    p_starts,
    p_x,
    p_sum,
    p_inverse,
    p_score,
    p_old_key,
    p_old_query,
    scale,
    raw_t,
    step_t,
    strength_t,
    tail_n,
    key_n,
    g_n,
    ring_raw_n,
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
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = 2 * HK * K + HV * V
    i_k = i_h // (HV // HK)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    if slot < 0:
        return
    start = tl.load(p_starts + i_b).to(tl.int64)
    n = (tl.load(p_starts + i_b + 1) - start).to(tl.int32)
    continues = tl.load(p_continues + i_b)
    context = tl.where(continues, tl.load(p_contexts + i_b), 0)
    count = tl.where(continues, tl.load(p_pending + i_b), 0)
    o, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    m, m_n, m_k, m_v = o < n, o < count, o_k < K, o_v < V
    m_own = m[:, None] & (m_k & (i_h % (HV // HK) == 0))[None, :]  # one program per key head
    m_value = m[:, None] & m_v[None, :]
    c_q, c_k, c_v = i_k * K + o_k, HK * K + i_k * K + o_k, 2 * HK * K + i_h * V + o_v
    p_ring_key += slot * key_n + i_k * (BT * K)
    p_ring_g += slot * g_n + i_h * BT
    p_ring_raw += slot * ring_raw_n
    p_tail += slot * tail_n
    p_raw += start * raw_t
    p_x += start * C + o[:, None] * C
    p_new = p_ring_raw + (count + o)[:, None] * C
    b_v, b_raw = _convolved(p_raw, p_ring_raw, p_tail, p_conv, context, count, n, raw_t, c_v, m_v, C, TAPS, BT)
    tl.store(p_x + c_v[None, :], b_v, mask=m_value)
    tl.store(p_new + c_v[None, :], b_raw.to(p_ring_raw.dtype.element_ty), mask=m_value)
    b_q, b_raw = _convolved(p_raw, p_ring_raw, p_tail, p_conv, context, count, n, raw_t, c_q, m_k, C, TAPS, BT)
    b_q = _unit(b_q) * scale
    tl.store(p_x + c_q[None, :], b_q, mask=m_own)
    tl.store(p_new + c_q[None, :], b_raw.to(p_ring_raw.dtype.element_ty), mask=m_own)
    b_k, b_raw = _convolved(p_raw, p_ring_raw, p_tail, p_conv, context, count, n, raw_t, c_k, m_k, C, TAPS, BT)
    b_low = _unit(b_k).to(p_ring_key.dtype.element_ty)  # as the ring will have it
    tl.store(p_x + c_k[None, :], b_low.to(tl.float32), mask=m_own)
    tl.store(p_new + c_k[None, :], b_raw.to(p_ring_raw.dtype.element_ty), mask=m_own)
    b_keys = tl.load(p_ring_key + o[:, None] * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
    tl.store(p_ring_key + (count + o)[:, None] * K + o_k[None, :], b_low, mask=m_own)

    b_g = decay_log(p_step + (start + o) * step_t + i_h, p_decay + i_h, p_bias + i_h, m)
    b_beta = strength(p_strength + (start + o) * strength_t + i_h, m)
    b_sums = tl.load(p_ring_g + o, mask=m_n, other=0.0)
    b_c = tl.load(p_ring_g + count - 1, mask=count > 0, other=0.0) + tl.cumsum(b_g, axis=0)
    tl.store(p_ring_g + count + o, b_c, mask=m)
    tl.store(p_sum + (start + o) * HV + i_h, b_c, mask=m)
    # [BT, BK] @ [BK, BT] -> [BT, BT]
    b_old = tl.where(m_n[None, :], tl.exp(tl.minimum(b_c[:, None] - b_sums[None, :], 0.0)), 0.0)
    b_new = tl.exp(tl.minimum(b_c[:, None] - b_c[None, :], 0.0))
    # Keys are in the ring's dtype; queries are rounded to it here alone.
    b_q = b_q.to(b_low.dtype)
    b_keys = tl.trans(b_keys)
    at = (start + o)[:, None] * (HV * BT) + i_h * BT + o[None, :]
    tl.store(p_old_key + at, tl.dot(b_low, b_keys, input_precision=PRECISION) * b_old, mask=m[:, None])
    tl.store(p_old_query + at, tl.dot(b_q, b_keys, input_precision=PRECISION) * b_old, mask=m[:, None])
    b_qk = tl.dot(b_q, tl.trans(b_low), input_precision=PRECISION) * b_new
    tl.store(p_score + at, tl.where(o[:, None] >= o[None, :], b_qk, 0.0), mask=m[:, None])
    b_kk = tl.dot(b_low, tl.trans(b_low), input_precision=PRECISION) * b_new * b_beta[:, None]
    b_a = _inverse(tl.where(o[:, None] > o[None, :], b_kk, 0.0), n, BT) * b_beta[None, :]
    tl.store(p_inverse + at, b_a, mask=m[:, None])


def prepare(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    ring: DeltaRing,
    rows: Rows,
    context_lens: Tensor,
    dims: tuple[int, int, int, int],
) -> Prepared:
    """dims: Hk, Hv, K, V. Appends the rows' tokens to their rings, but for the corrections. Tokens of padding rows are
    left as they are."""
    key_heads, num_heads, K, V = dims
    num_tokens, places = inputs.raw.shape[0], ring.key.shape[2]
    is_float = inputs.raw.dtype == torch.float32
    x = torch.empty(inputs.raw.shape, dtype=torch.float32, device=inputs.raw.device)
    decay = x.new_empty(num_tokens, num_heads)
    matrices = x.new_empty(4, num_tokens, num_heads, places)
    _prepare_kernel[(num_heads, rows.slots.shape[0])](
        *inputs,
        *weights,
        pool.tail,
        ring.key,
        ring.decay,
        ring.raw,
        ring.num_pending,
        rows.slots,
        rows.continues,
        context_lens,
        rows.starts,
        x,
        decay,
        *matrices,
        K**-0.5,
        *(part.stride(0) for part in (*inputs, pool.tail, ring.key, ring.decay, ring.raw)),
        HK=key_heads,
        HV=num_heads,
        K=K,
        V=V,
        TAPS=TAPS,
        BT=places,
        BK=padded(K),
        BV=padded(V),
        PRECISION="ieee" if is_float else "tf32",
        num_warps=2 if num_heads * rows.slots.shape[0] >= 8 * num_processors(x.device) else 4,
    )
    return Prepared(x, decay, *matrices)
