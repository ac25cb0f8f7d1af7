# ruff: noqa: ANN201 device functions return registers
"""The two gates of a token at a value head, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decay_log(p_step, p_decay, p_bias, mask):
    """g = -e^decay softplus(step + bias), 0 where masked out: such a token keeps the state. `softplus` is the identity
    from 20 on, as PyTorch's."""
    b_x = tl.load(p_step, mask=mask, other=0.0).to(tl.float32) + tl.load(p_bias)
    b_soft = tl.where(b_x > 20.0, b_x, tl.log(1.0 + tl.exp(tl.minimum(b_x, 20.0))))
    return tl.where(mask, -tl.exp(tl.load(p_decay)) * b_soft, 0.0)


@triton.jit
def strength(p_strength, mask):
    """beta = sigmoid(strength), 0 where masked out: such a token writes nothing."""
    b_x = tl.load(p_strength, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, tl.sigmoid(b_x), 0.0)
