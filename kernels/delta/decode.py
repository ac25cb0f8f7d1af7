"""`decode`: one token per row in one launch, its convolution, norms and gates included.

A program owns BV channels of a value head. It reads its tile of the state once: with d = e^g,

    u = beta (v - S (d k)),   o = S (d q) + (q . k) u,   S = d S + u k^T.

The token's raw values go to its place of the tail, which no program of the launch reads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from .contract import TAPS, DeltaInputs, DeltaState, DeltaWeights
from .gates import decay_log, strength
from .tiles import head_counts, step_tiles
from .token import channels, convolved, state_tile, unit


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_contexts"])
def _decode_kernel(
    p_raw,
    p_step,
    p_strength,
    p_conv,
    p_decay,
    p_bias,
    p_state,
    p_tail,
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
    o_t,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TAPS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C: tl.constexpr = 2 * HK * K + HV * V
    i_k = i_h // (HV // HK)
    c_q, c_k, c_v, m_k, m_v = channels(i_k, i_h, i_v, K, V, HK, BK, BV)
    p_o += i_b * o_t + (c_v - 2 * HK * K)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    if slot < 0:
        tl.store(p_o, tl.zeros([BV], p_o.dtype.element_ty), mask=m_v)
        return
    position = tl.where(tl.load(p_continues + i_b), tl.load(p_contexts + i_b), 0)
    at, m_s = state_tile(slot, i_h, i_v, state_n, K, V, BK, BV)
    # All loads before the first sum, which is a barrier.
    b_s = tl.load(p_state + at, mask=m_s & (position > 0), other=0.0).to(tl.float32)
    p_raw += i_b * raw_t
    b_raw_q = tl.load(p_raw + c_q, mask=m_k, other=0.0)
    b_raw_k = tl.load(p_raw + c_k, mask=m_k, other=0.0)
    b_raw_v = tl.load(p_raw + c_v, mask=m_v, other=0.0)
    p_tail += slot * tail_n
    b_q = convolved(b_raw_q, p_tail, None, p_conv, position, 0, c_q, m_k, C, TAPS)
    b_k = convolved(b_raw_k, p_tail, None, p_conv, position, 0, c_k, m_k, C, TAPS)
    b_v = convolved(b_raw_v, p_tail, None, p_conv, position, 0, c_v, m_v, C, TAPS)
    b_d = tl.exp(decay_log(p_step + i_b * step_t + i_h, p_decay + i_h, p_bias + i_h, True))
    b_beta = strength(p_strength + i_b * strength_t + i_h, True)
    b_q, b_k = unit(b_q) * scale, unit(b_k)
    # [BV, BK] * [1, BK] -> [BV]
    b_u = b_beta * (b_v - tl.sum(b_s * (b_k * b_d)[None, :], axis=1))
    b_o = tl.sum(b_s * (b_q * b_d)[None, :], axis=1) + tl.sum(b_q * b_k, axis=0) * b_u
    tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_v)
    b_s = b_s * b_d + b_u[:, None] * b_k[None, :]
    tl.store(p_state + at, b_s.to(p_state.dtype.element_ty), mask=m_s)
    p_tail += position % TAPS * C
    tl.store(p_tail + c_v, b_raw_v.to(p_tail.dtype.element_ty), mask=m_v)
    m_own = m_k & (i_v == 0) & (i_h % (HV // HK) == 0)  # of the programs that share a key head, one writes
    tl.store(p_tail + c_q, b_raw_q.to(p_tail.dtype.element_ty), mask=m_own)
    tl.store(p_tail + c_k, b_raw_k.to(p_tail.dtype.element_ty), mask=m_own)


def decode(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    rows: Rows,
    context_lens: Tensor,
    out: Tensor,
) -> Tensor:
    """Contract: `Delta.decode`."""
    key_heads, num_heads, K, V = head_counts(inputs, pool)
    tiles = step_tiles(pool, num_rows=rows.slots.shape[0])
    grid = (triton.cdiv(V, tiles.BV), num_heads, rows.slots.shape[0])
    if 0 in grid:
        return out
    _decode_kernel[grid](
        *inputs,
        *weights,
        *pool,
        rows.slots,
        rows.continues,
        context_lens,
        out,
        K**-0.5,
        *(part.stride(0) for part in (*inputs, *pool, out)),
        HK=key_heads,
        HV=num_heads,
        K=K,
        V=V,
        TAPS=TAPS,
        **tiles._asdict(),
    )
    return out
