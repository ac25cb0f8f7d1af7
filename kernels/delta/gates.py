# ruff: noqa: ANN201 device functions return registers
"""The two gates of a token at a value head, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _softplus(b_x):
    """log(1 + e^x) = max(x, 0) + log(1 + z), z = e^-|x|. With r = z / (2 + z) <= 1/3, log(1 + z) = 2 (r + r^3/3 + ..):
    a logarithm of 1 + z would lose the digits of a small z, and so a slow decay its time."""
    b_z = tl.exp(-tl.abs(b_x))
    b_r = b_z / (2.0 + b_z)
    b_rr = b_r * b_r
    b_sum = 1 / 11 + b_rr * (1 / 13)
    b_sum = 1 / 5 + b_rr * (1 / 7 + b_rr * (1 / 9 + b_rr * b_sum))
    return tl.maximum(b_x, 0.0) + 2.0 * b_r * (1.0 + b_rr * (1 / 3 + b_rr * b_sum))


@triton.jit
def decay_log(p_step, p_decay, p_bias, mask):
    """g = -e^decay softplus(step + bias), 0 where masked out: such a token keeps the state."""
    b_x = tl.load(p_step, mask=mask, other=0.0).to(tl.float32) + tl.load(p_bias)
    return tl.where(mask, -tl.exp(tl.load(p_decay)) * _softplus(b_x), 0.0)


@triton.jit
def strength(p_strength, mask):
    """beta = sigmoid(strength), 0 where masked out: such a token writes nothing."""
    b_x = tl.load(p_strength, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, tl.sigmoid(b_x), 0.0)
