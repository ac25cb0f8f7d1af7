# ruff: noqa: ANN201 device functions return registers
"""Shared by the lightning kernels: tile sizes, a state tile [BK, BV] in registers, and the walk of a row with it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ZERO_DECAY = 104.0  # e^{-104} is zero in float32


class Tiles(NamedTuple):
    """BT tokens, BK >= K and BV channels per tile; how the dot with the float32 state is computed; launch options.

    A dot takes 16 at least in every dim. bfloat16 inputs meet a state, and scores meet values, rounded to bfloat16;
    float16 inputs in tf32, which has float16's mantissa without its overflow; float32 inputs in full float32.
    """

    BT: int
    BK: int
    BV: int
    DOT: tl.dtype
    PRECISION: str
    num_warps: int
    num_stages: int


def padded(size: int) -> int:
    """The power of two that holds `size` channels, and that a dot takes."""
    return max(16, triton.next_power_of_2(size))


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for the interpreter, which gains nothing from more programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def walk_tiles(q: Tensor, v: Tensor, num_walks: int) -> Tiles:
    """Tiles for `num_walks` walks per head through q [T, H, K], v [T, H, V], so that state and operands fit registers
    and shared memory.

    Few programs get three stages, which leave room for one per processor; many get two, and hide each other's waits.
    """
    BK, BV = padded(q.shape[-1]), padded(v.shape[-1])
    if q.dtype == torch.float32:
        return Tiles(32, BK, min(BV, 32), tl.float32, "ieee", 4, 2)
    dot = tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32
    BV = min(BV, 64 if BK <= 128 else 32)
    programs = num_walks * q.shape[1] * triton.cdiv(v.shape[-1], BV)
    few = programs <= 3 * num_processors(q.device) and BK <= 128 and dot == tl.bfloat16
    return Tiles(64, BK, BV, dot, "tf32", 4, 3 if few else 2)


class StepTiles(NamedTuple):
    """A state tile [BK, BV] of a single token's step, and warps per program."""

    BK: int
    BV: int
    num_warps: int


def step_tiles(q: Tensor, v: Tensor, BV: int, num_warps: int) -> StepTiles:
    """Tiles for one token per row, q [B, H, K], v [B, H, V], at most BV channels wide."""
    return StepTiles(padded(q.shape[-1]), min(padded(v.shape[-1]), BV), num_warps)


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
def load_rows(p_x, start, n, i_c, stride_t, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Tokens start..start + BT of x [n, C] at channels i_c * BC.., zeros past either end: [BT, BC]."""
    o_t = tl.arange(0, BT)
    o_c = i_c * BC + tl.arange(0, BC)
    p_x += tl.cast(start, tl.int64) * stride_t + o_t[:, None] * stride_t + o_c[None, :]
    if C % BC == 0:
        b_x = tl.load(p_x, mask=(o_t < n - start)[:, None], other=0.0)
    else:
        b_x = tl.load(p_x, mask=(o_t < n - start)[:, None] & (o_c < C)[None, :], other=0.0)
    return b_x


@triton.jit
def load_ring(p_ring, i_c, count, C, BT: tl.constexpr, BC: tl.constexpr):
    """The waiting tokens' channels i_c * BC.., zeros in places where no token waits: [BT, BC]."""
    o_i = tl.arange(0, BT)
    o_c = i_c * BC + tl.arange(0, BC)
    mask = (o_i < count)[:, None] & (o_c < C)[None, :]
    return tl.load(p_ring + o_i[:, None] * C + o_c[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(p_x, b_x, start, n, i_c, stride_t, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """The inverse of `load_rows`, in x's dtype."""
    o_t = tl.arange(0, BT)
    o_c = i_c * BC + tl.arange(0, BC)
    p_x += tl.cast(start, tl.int64) * stride_t + o_t[:, None] * stride_t + o_c[None, :]
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=(o_t < n - start)[:, None] & (o_c < C)[None, :])


@triton.jit
def walk(
    p_q,
    p_k,
    p_v,
    p_o,
    b_s,
    slope,
    scale,
    n,
    i_v,
    q_t: tl.constexpr,
    k_t: tl.constexpr,
    v_t: tl.constexpr,
    o_t: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """n tokens at a head, block by block from the state tile b_s: writes o, returns the state after them.

    `lightning/reference.py` has the formulas. No decay is ever divided by, so that no factor exceeds 1. Token strides
    are constants: as arguments they took some 60 registers, and the state tile was spilled.
    """
    a = tl.arange(0, BT)
    lag = a[:, None] - a[None, :]
    b_decay = tl.where(lag >= 0, tl.exp(-slope * tl.maximum(lag, 0)) * scale, 0.0)  # [BT, BT]
    b_in = tl.exp(-slope * (a + 1)) * scale
    for start in range(0, n, BT):
        m = tl.minimum(n - start, BT)
        b_q = load_rows(p_q, start, n, 0, q_t, K, BT, BK)
        b_k = load_rows(p_k, start, n, 0, k_t, K, BT, BK)
        b_v = load_rows(p_v, start, n, i_v, v_t, V, BT, BV)
        # [BT, BK] @ [BK, BT] -> [BT, BT]
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_decay
        # [BT, BK] @ [BK, BV] -> [BT, BV]
        b_o = tl.dot(b_q.to(DOT), b_s.to(DOT), input_precision=PRECISION) * b_in[:, None]
        # [BT, BT] @ [BT, BV] -> [BT, BV]
        b_o = tl.dot(b_score.to(DOT), b_v.to(DOT), b_o, input_precision=PRECISION)
        store_rows(p_o, b_o, start, n, i_v, o_t, V, BT, BV)
        b_out = tl.exp(-slope * tl.maximum(m - 1 - a, 0))
        b_v = (b_v * b_out[:, None]).to(b_v.dtype)
        # [BK, BT] @ [BT, BV] -> [BK, BV]
        b_s = tl.dot(tl.trans(b_k), b_v, b_s * tl.exp(-slope * m), input_precision=PRECISION)
    return b_s


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
