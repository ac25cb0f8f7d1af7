"""`verify`: a few tokens at once, of which perhaps only the first will be kept, so the state is only read.

All of a row's m tokens but the first are drafts. With G the sum of g of the tokens that wait since the last fold, c the
sums of the new ones, and D_ab = e^{c_a - c_b},

    R_a = e^{G + c_a} S k_a + sum_i e^{G + c_a - G_i} (k_i . k_a) u_i
    (I + L) U = diag(beta) (V - R),   L = strictly lower(beta_a (k_a . k_b) D_ab)

and o_a the same sums with q_a in place of k_a, plus sum_{b <= a} (q_a . k_b) D_ab u_b. A correction depends on no later
token, so the caller's next count of waiting tokens is all that tells which are kept. No state is copied.

The first launch (`verify_prepare.py`) computes what needs no state. The second one, here, reads each state once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from ..lightning.tile import padded
from .contract import DeltaInputs, DeltaRing, DeltaState, DeltaWeights
from .tiles import head_counts
from .token import state_tile
from .verify_prepare import prepare


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_contexts", "p_pending", "p_starts"])
def _verify_kernel(
    p_x,
    p_sum,
    p_inverse,
    p_score,
    p_old_key,
    p_old_query,
    p_state,
    p_ring_u,
    p_pending,
    p_slots,
    p_continues,
    p_contexts,
    p_starts,
    p_o,
    state_n,
    u_n,
    o_t,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C: tl.constexpr = 2 * HK * K + HV * V
    o, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_v, m_k = o_v < V, o_k < K
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
    m = o < n
    at_s, m_s = state_tile(slot, i_h, i_v, state_n, K, V, BK, BV)
    b_s = tl.trans(tl.load(p_state + at_s, mask=m_s & (context > count), other=0.0).to(tl.float32))
    p_x += start * C + o[:, None] * C
    m_x = m[:, None] & m_k[None, :]
    b_q = tl.load(p_x + (i_h // (HV // HK) * K + o_k)[None, :], mask=m_x, other=0.0)
    b_k = tl.load(p_x + (HK * K + i_h // (HV // HK) * K + o_k)[None, :], mask=m_x, other=0.0)
    b_v = tl.load(p_x + (2 * HK * K + i_h * V + o_v)[None, :], mask=m[:, None] & m_v[None, :], other=0.0)
    b_in = tl.exp(tl.load(p_sum + (start + o) * HV + i_h, mask=m, other=0.0))[:, None]
    p_ring_u += slot * u_n + i_h * (BT * V) + o_v[None, :]
    b_us = tl.load(p_ring_u + o[:, None] * V, mask=(o < count)[:, None] & m_v[None, :], other=0.0).to(tl.float32)
    at = (start + o)[:, None] * (HV * BT) + i_h * BT + o[None, :]
    b_ko = tl.load(p_old_key + at, mask=m[:, None], other=0.0)
    b_qo = tl.load(p_old_query + at, mask=m[:, None], other=0.0)
    b_a = tl.load(p_inverse + at, mask=m[:, None] & m[None, :], other=0.0)
    b_qk = tl.load(p_score + at, mask=m[:, None] & m[None, :], other=0.0)
    # [BT, BK] @ [BK, BV] -> [BT, BV], [BT, BT] @ [BT, BV] -> [BT, BV]
    b_r = tl.dot(b_ko, b_us, tl.dot(b_k, b_s, input_precision=PRECISION) * b_in, input_precision=PRECISION)
    b_o = tl.dot(b_qo, b_us, tl.dot(b_q, b_s, input_precision=PRECISION) * b_in, input_precision=PRECISION)
    b_u = tl.dot(b_a, b_v - b_r, input_precision=PRECISION).to(p_ring_u.dtype.element_ty)
    b_o = tl.dot(b_qk, b_u.to(tl.float32), b_o, input_precision=PRECISION)
    m_o = m[:, None] & m_v[None, :]
    tl.store(p_o + o[:, None] * o_t + o_v[None, :], b_o.to(p_o.dtype.element_ty), mask=m_o)
    tl.store(p_ring_u + (count + o)[:, None] * V, b_u, mask=m_o)


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
    key_heads, num_heads, K, V = dims = head_counts(inputs, pool)
    num_rows = rows.slots.shape[0]
    if 0 in (num_heads, num_rows):
        return out
    prepared = prepare(inputs, weights, pool, ring, rows, context_lens, dims)
    BV = min(padded(V), 64)
    _verify_kernel[(triton.cdiv(V, BV), num_heads, num_rows)](
        *prepared,
        pool.state,
        ring.correction,
        ring.num_pending,
        rows.slots,
        rows.continues,
        context_lens,
        rows.starts,
        out,
        *(part.stride(0) for part in (pool.state, ring.correction, out)),
        HK=key_heads,
        HV=num_heads,
        K=K,
        V=V,
        BT=ring.key.shape[2],
        BK=padded(K),
        BV=BV,
        PRECISION="ieee" if inputs.raw.dtype == torch.float32 else "tf32",
        num_warps=4,
    )
    return out
