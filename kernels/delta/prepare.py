"""Second launch of a prompt: the part of each chunk that needs no state, all chunks in parallel.

Of each chunk and value head: c, the sums of g from its start; A = (I + L)^{-1} diag(beta); P, the scores.
`reference.py` has the formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from ..lightning.tile import padded
from .chunks import find_chunk, num_chunks
from .contract import CHUNK, DeltaInputs, DeltaWeights
from .gates import decay_log, strength
from .solve import solve


class Prepared(NamedTuple):
    """Of each token and value head; `inverse` and `score` are rows of its chunk's matrices."""

    decay: Tensor  # [T, Hv] float32, c
    inverse: Tensor  # [T, Hv, CHUNK] in the inputs' dtype, A
    score: Tensor  # [T, Hv, CHUNK], P


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["p_slots", "p_continues", "p_contexts", "p_starts"],
)
def _prepare_kernel(
    p_x,
    p_step,
    p_strength,
    p_decay_log,
    p_bias,
    p_slots,
    p_continues,
    p_contexts,
    p_starts,
    p_decay,
    p_inverse,
    p_score,
    scale,
    num_rows,
    step_t,
    strength_t,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    MERGE: tl.constexpr,
):
    i_h, i_c = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = 2 * HK * K + HV * V
    i_b, start, first, end = find_chunk(p_starts, p_contexts, p_continues, num_rows, i_c, CHUNK)
    if tl.load(p_slots + i_b) < 0 or first >= end:
        return
    i_k = i_h // (HV // HK)
    o, o_k = tl.arange(0, CHUNK), tl.arange(0, BK)
    m = o < end - first
    token = start + first
    p_q = p_x + token * C + i_k * K + (o[:, None] * C + o_k[None, :])
    m_k = m[:, None] & (o_k < K)[None, :]
    b_k = tl.load(p_q + HK * K, mask=m_k, other=0.0)
    b_q = tl.load(p_q, mask=m_k, other=0.0)
    b_g = decay_log(p_step + token * step_t + i_h + o * step_t, p_decay_log + i_h, p_bias + i_h, m)
    b_beta = strength(p_strength + token * strength_t + i_h + o * strength_t, m)
    b_c = tl.cumsum(b_g, axis=0)
    tl.store(p_decay + token * HV + i_h + o * HV, b_c, mask=m)
    b_decay = tl.exp(tl.minimum(b_c[:, None] - b_c[None, :], 0.0))
    lower = o[:, None] >= o[None, :]
    p_rows = (token * HV + i_h) * CHUNK + (o[:, None] * (HV * CHUNK) + o[None, :])
    # [CHUNK, BK] @ [BK, CHUNK] -> [CHUNK, CHUNK]
    b_p = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_decay * scale
    tl.store(p_score + p_rows, tl.where(lower, b_p, 0.0).to(p_score.dtype.element_ty), mask=m[:, None])
    b_l = tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION) * b_decay * b_beta[:, None]
    b_a = solve(tl.where(o[:, None] > o[None, :], b_l, 0.0), MERGE)
    tl.store(p_inverse + p_rows, (b_a * b_beta[None, :]).to(p_inverse.dtype.element_ty), mask=m[:, None])


def prepare(
    x: Tensor,
    inputs: DeltaInputs,
    weights: DeltaWeights,
    rows: Rows,
    context_lens: Tensor,
    dims: tuple[int, int, int, int],
) -> Prepared:
    """x: the result of `convolve`. dims: Hk, Hv, K, V. Tokens of padding rows are left as they are."""
    key_heads, num_heads, K, V = dims
    num_tokens, num_rows = x.shape[0], rows.slots.shape[0]
    decay = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=x.device)
    inverse, score = x.new_empty(2, num_tokens, num_heads, CHUNK)
    is_float = x.dtype == torch.float32
    _prepare_kernel[(num_heads, num_chunks(num_tokens, num_rows))](
        x,
        inputs.step,
        inputs.strength,
        weights.decay,
        weights.step_bias,
        rows.slots,
        rows.continues,
        context_lens,
        rows.starts,
        decay,
        inverse,
        score,
        K**-0.5,
        num_rows,
        inputs.step.stride(0),
        inputs.strength.stride(0),
        HK=key_heads,
        HV=num_heads,
        K=K,
        V=V,
        CHUNK=CHUNK,
        BK=padded(K),
        PRECISION="ieee" if is_float else "tf32",
        MERGE="ieee" if is_float else "tf32",
        num_warps=4,
        maxnreg=None if is_float else 128,  # so that four programs fit a processor
    )
    return Prepared(decay, inverse, score)
