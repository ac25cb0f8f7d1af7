# ruff: noqa: ANN201 device functions return registers
"""One token at one value head: its channels, its convolution, its norms, and the tile [BV, BK] of its state."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channels(i_k, i_h, i_v, K, V, HK, BK: tl.constexpr, BV: tl.constexpr):
    """Channels of a key head's query and key, and of a tile of a value head's value, with their masks: of the query
    [BK], of the key [BK], of the value [BV], mask of the first two, mask of the last."""
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    c_q = i_k * K + o_k
    return c_q, HK * K + c_q, 2 * HK * K + i_h * V + o_v, o_k < K, o_v < V


@triton.jit
def convolved(b_raw, p_tail, p_ring, p_conv, position, count, o_c, m_c, C: tl.constexpr, TAPS: tl.constexpr):
    """silu of the convolution at channels o_c of the token at `position`, whose raw values are b_raw.

    The `count` tokens before it lie in the ring, oldest first, those before them in the tail.
    """
    b_x = b_raw.to(tl.float32) * tl.load(p_conv + (TAPS - 1) * C + o_c, mask=m_c, other=0.0)
    for j in tl.static_range(1, TAPS):
        p_old = p_tail + (position - j + TAPS) % TAPS * C
        if p_ring is not None:
            p_old = tl.where(count >= j, p_ring + (count - j) * C, p_old)
        b_old = tl.load(p_old + o_c, mask=m_c & (position >= j), other=0.0)
        b_x += b_old.to(tl.float32) * tl.load(p_conv + (TAPS - 1 - j) * C + o_c, mask=m_c, other=0.0)
    return b_x * tl.sigmoid(b_x)


@triton.jit
def unit(b_x):
    """b_x [BK] of length 1."""
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) + 1e-6)


@triton.jit
def state_tile(slot, i_h, i_v, state_n, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """Offsets [BV, BK] and mask of a tile of state[slot, i_h]; int64."""
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    at = slot * state_n + i_h * (V * K) + (o_v[:, None] * K + o_k[None, :])
    return at, (o_v < V)[:, None] & (o_k < K)[None, :]
