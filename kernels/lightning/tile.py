# ruff: noqa: ANN201 device functions return registers
"""What the lightning kernels share: tile sizes, and a state tile [BK, BV] in registers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """BT tokens, BK >= K and BV channels per tile; how the dot with the float32 state is computed.

    A dot takes 16 at least in every dim. bfloat16 inputs meet a state rounded to bfloat16; float16 inputs
    meet it in tf32, which has float16's mantissa without its overflow; float32 inputs in full float32.
    """

    BT: int
    BK: int
    BV: int
    DOT: tl.dtype
    PRECISION: str


def tiles_for(q: Tensor, v: Tensor) -> Tiles:
    """Tiles for q [T, H, K], v [T, H, V] so that state and operands fit registers and shared memory."""
    BK = max(16, triton.next_power_of_2(q.shape[-1]))
    BV = max(16, triton.next_power_of_2(v.shape[-1]))
    if q.dtype == torch.float32:
        return Tiles(32, BK, min(BV, 32), tl.float32, "ieee")
    dot = tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32
    return Tiles(64, BK, min(BV, 64 if BK <= 128 else 32), dot, "tf32")


@triton.jit
def state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """Pointers [BK, BV] and mask of one V tile of state[slot, i_h]; the slot offset is int64."""
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    p_s = p_state + slot.to(tl.int64) * s_n + i_h * s_h + o_k[:, None] * s_k + o_v[None, :]
    return p_s, (o_k < K)[:, None] & (o_v < V)[None, :]


@triton.jit
def load_state(p_s, m_s, continues, BK: tl.constexpr, BV: tl.constexpr):
    """The slot's content in float32, or zeros without touching it."""
    b_s = tl.zeros([BK, BV], tl.float32)
    if continues:
        b_s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
    return b_s


@triton.jit
def decay_minus_one(slope):
    """e^{-s} - 1 to full precision: an error in e^{-s} itself grows by 1/s over a long decode."""
    x = -slope
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(slope < 0.25, series, tl.exp(x) - 1)


@triton.jit
def token_step(p_q, p_k, p_v, p_o, b_s, slope, scale, i_v, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """One token at a head: S = e^{-s} S + k v^T, writes o = scale * q S, returns S."""
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    b_q = tl.load(p_q + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    # [BK, 1] * [1, BV] -> [BK, BV]
    b_s += b_s * decay_minus_one(slope) + b_k[:, None] * b_v[None, :]
    # [BK, 1] * [BK, BV] -> [BV]
    b_o = tl.sum(b_q[:, None] * b_s, axis=0) * scale
    tl.store(p_o + o_v, b_o.to(p_o.dtype.element_ty), mask=o_v < V)
    return b_s


@triton.jit
def load_rows(p_x, start, n, i_c, stride_t, C, BT: tl.constexpr, BC: tl.constexpr):
    """Tokens start..start + BT of x [n, C] at channels i_c * BC.., zeros past either end: [BT, BC]."""
    o_t = start + tl.arange(0, BT)
    o_c = i_c * BC + tl.arange(0, BC)
    return tl.load(
        p_x + o_t.to(tl.int64)[:, None] * stride_t + o_c[None, :],
        mask=(o_t < n)[:, None] & (o_c < C)[None, :],
        other=0.0,
    )


@triton.jit
def store_rows(p_x, b_x, start, n, i_c, stride_t, C, BT: tl.constexpr, BC: tl.constexpr):
    """The inverse of `load_rows`, in x's dtype."""
    o_t = start + tl.arange(0, BT)
    o_c = i_c * BC + tl.arange(0, BC)
    tl.store(
        p_x + o_t.to(tl.int64)[:, None] * stride_t + o_c[None, :],
        b_x.to(p_x.dtype.element_ty),
        mask=(o_t < n)[:, None] & (o_c < C)[None, :],
    )
