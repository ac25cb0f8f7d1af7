"""First launch of a prompt: convolution, silu, and the l2 norm of queries and keys, of all tokens in parallel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from ..lightning.tile import padded
from ..varlen import find_block, num_blocks
from .contract import TAPS, DeltaInputs, DeltaState, DeltaWeights

BT = 32  # tokens of a program


@triton.jit
def _weighed(p_token, p_conv, o_c, mask, m_c, C: tl.constexpr, TAPS: tl.constexpr, J: tl.constexpr):
    """Raw values of the tokens J before a program's, times their tap, [BT, BD] float32. p_token: [BT, 1] pointers."""
    b_raw = tl.load(p_token + o_c[None, :], mask=mask & m_c[None, :], other=0.0)
    b_tap = tl.load(p_conv + (TAPS - 1 - J) * C + o_c, mask=m_c, other=0.0)
    return b_raw.to(tl.float32) * b_tap[None, :]


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["p_slots", "p_continues", "p_contexts", "p_starts"],
)
def _convolve_kernel(
    p_raw,
    p_conv,
    p_tail,
    p_slots,
    p_continues,
    p_contexts,
    p_starts,
    p_x,
    num_rows,
    raw_t,
    tail_n,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    TAPS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """BT tokens of one row at one head, be it of queries, keys or values."""
    i_h, i_t = tl.program_id(0), tl.program_id(1)
    C: tl.constexpr = 2 * HK * K + HV * V
    i_b, i_local = find_block(p_starts, num_rows, i_t, BT)
    start = tl.load(p_starts + i_b).to(tl.int64)
    n = (tl.load(p_starts + i_b + 1) - start).to(tl.int32)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    first = i_local * BT
    if slot < 0 or first >= n:
        return
    is_value = i_h >= 2 * HK
    o, o_d = tl.arange(0, BT), tl.arange(0, BD)
    o_c = tl.where(is_value, 2 * HK * K + (i_h - 2 * HK) * V, i_h * K) + o_d
    m, m_d = o < n - first, o_d < tl.where(is_value, V, K)
    p_raw += (start + first) * raw_t
    b_x = tl.zeros([BT, BD], tl.float32)
    if first > 0:
        for j in tl.static_range(TAPS):
            b_x += _weighed(p_raw + ((o - j) * raw_t)[:, None], p_conv, o_c, m[:, None], m_d, C, TAPS, j)
    else:
        # The three tokens before the row lie in the tail.
        context = tl.where(tl.load(p_continues + i_b), tl.load(p_contexts + i_b), 0)
        p_tail += slot * tail_n
        for j in tl.static_range(TAPS):
            t = o - j
            p_token = tl.where(t >= 0, p_raw + t * raw_t, p_tail + (context + t + TAPS) % TAPS * C)
            mask = m & (context + t >= 0)
            b_x += _weighed(p_token[:, None], p_conv, o_c, mask[:, None], m_d, C, TAPS, j)
    b_x = b_x / (1.0 + tl.exp(-b_x))
    if not is_value:
        b_x *= tl.rsqrt(tl.sum(b_x * b_x, axis=1) + 1e-6)[:, None]
    p_x += (start + first) * C
    tl.store(p_x + o[:, None] * C + o_c[None, :], b_x.to(p_x.dtype.element_ty), mask=m[:, None] & m_d[None, :])


def convolve(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    rows: Rows,
    context_lens: Tensor,
    dims: tuple[int, int, int, int],
) -> Tensor:
    """[T, C] in the inputs' dtype: queries and keys of length 1, and values. Reads the tails of the slots. Tokens of
    padding rows are left as they are. dims: Hk, Hv, K, V."""
    key_heads, num_heads, K, V = dims
    num_tokens, channels = inputs.raw.shape
    num_rows = rows.slots.shape[0]
    x = inputs.raw.new_empty(num_tokens, channels)
    _convolve_kernel[(2 * key_heads + num_heads, num_blocks(num_tokens, num_rows, BT))](
        inputs.raw,
        weights.conv,
        pool.tail,
        rows.slots,
        rows.continues,
        context_lens,
        rows.starts,
        x,
        num_rows,
        inputs.raw.stride(0),
        pool.tail.stride(0),
        HK=key_heads,
        HV=num_heads,
        K=K,
        V=V,
        TAPS=TAPS,
        BT=BT,
        BD=padded(max(K, V)),
        num_warps=8,
    )
    return x
