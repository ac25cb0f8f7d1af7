# ruff: noqa: ANN201 device functions return registers
"""One token at one value head: its convolution, its norms and gates, and the tile of its state.

A tile's keys lie on two axes, [J, BV, L] with L = 32 of K at most: a sum over K adds J values in each thread, and then
those of 8 threads. On one axis it would add those of a whole warp, and such sums take more time than the state's bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_channels(BK: tl.constexpr, L: tl.constexpr):
    """0 .. BK - 1 as [J, L]."""
    return tl.arange(0, BK // L)[:, None] * L + tl.arange(0, L)[None, :]


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
    """b_x [J, L] of length 1."""
    return b_x * tl.rsqrt(tl.sum(tl.sum(b_x * b_x, axis=0), axis=0) + 1e-6)


@triton.jit
def times(b_tile, b_x):
    """[J, N, L] times a vector of keys [J, L] -> [N]."""
    return tl.sum(tl.sum(b_tile * b_x[:, None, :], axis=0), axis=1)


@triton.jit
def rows_of_keys(o_n, n, K, BK: tl.constexpr, L: tl.constexpr):
    """Offsets [J, N, L] and mask of the rows o_n < n of a matrix [n, K]."""
    o_k = key_channels(BK, L)
    return o_n[None, :, None] * K + o_k[:, None, :], (o_n < n)[None, :, None] & (o_k < K)[:, None, :]
