"""A few rows times a matrix in 8 or 4 bits, whose bytes are read once per row and never held in another format.

A program reads words of 32 bits. Conversions would bound it, so items become float32 by masks: an integer below 2^24 in
a word's low bits is, as a float32, that integer times 2^-149, and its place in the word is a power of two that x takes.
The bits of an fp8 number, moved to the exponent's low end, are the number times 2^-120. x is scaled up before, so that
no product is lost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Weight

UP = tl.constexpr(2.0**100)  # of x beside integers
DOWN = tl.constexpr(2.0**49)  # what is left of 2^-149 then
HALF_UP = tl.constexpr(2.0**60)  # of x beside fp8, and again of the sums
MAX_PRODUCTS = 4  # rows; more are cheaper by way of a plain matrix


@triton.jit
def _fp8(b_w, p_x, o_w, m):
    """Words of four fp8 numbers times x, [BN, BK] float32 / 2^60."""
    b_y = tl.zeros(b_w.shape, tl.float32)
    for i in tl.static_range(4):
        b_x = tl.load(p_x + o_w * 4 + i, mask=m, other=0.0).to(tl.float32) * HALF_UP
        # Sign at bit 31, and by the arithmetic shift exponent and mantissa from bit 20 on.
        b_y += (((b_w << (24 - 8 * i)) >> 4) & -2014314496).to(tl.float32, bitcast=True) * b_x[None, :]
    return b_y


@triton.jit
def _int8(b_w, p_x, o_w, m):
    """Words of four int8 times x, [BN, BK] float32 / 2^49."""
    b_w = b_w ^ -2139062144  # + 128 each
    b_high = b_w >> 8
    b_y = tl.zeros(b_w.shape, tl.float32)
    b_sum = tl.zeros(o_w.shape, tl.float32)
    for i in tl.static_range(4):
        b_x = tl.load(p_x + o_w * 4 + i, mask=m, other=0.0).to(tl.float32)
        b_sum += b_x
        if i < 3:
            b_y += (b_w & (0xFF << (8 * i))).to(tl.float32, bitcast=True) * (b_x * (UP / (1 << (8 * i))))[None, :]
        else:
            b_y += (b_high & 0xFF0000).to(tl.float32, bitcast=True) * (b_x * (UP / (1 << 16)))[None, :]
    return b_y - (b_sum * (128 / DOWN))[None, :]


@triton.jit
def _int4(b_w, b_offset, p_x, o_c, m, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Nibbles FIRST .. of words, less the offset, times x, [BN, BK] float32 / 2^49. Nibble i is column o_c + 8 i."""
    b_high = b_w >> 8
    b_y = tl.zeros(b_w.shape, tl.float32)
    b_sum = tl.zeros(o_c.shape, tl.float32)
    for i in tl.static_range(FIRST, FIRST + COUNT):
        b_x = tl.load(p_x + o_c + 8 * i, mask=m, other=0.0).to(tl.float32)
        b_sum += b_x
        if i < 6:
            b_y += (b_w & (0xF << (4 * i))).to(tl.float32, bitcast=True) * (b_x * (UP / (1 << (4 * i))))[None, :]
        else:
            b_f = (b_high & (0xF << (4 * i - 8))).to(tl.float32, bitcast=True)
            b_y += b_f * (b_x * (UP / (1 << (4 * i - 8))))[None, :]
    return b_y - (b_sum * (1 / DOWN))[None, :] * b_offset


@triton.jit(do_not_specialize_on_alignment=["p_experts"])
def _rows_kernel(
    p_x,
    p_w,
    p_scale,
    p_zero,
    p_experts,
    p_y,
    N,
    x_t,
    w_e,
    w_n,
    s_e,
    s_n,
    PER_ROW: tl.constexpr,
    FORMAT: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BN channels of a product. Product i takes row i // PER_ROW of x, and expert p_experts[i] if there are any."""
    i_p = tl.program_id(1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_r = tl.minimum(o_n, N - 1).to(tl.int64)
    p_x += (i_p // PER_ROW).to(tl.int64) * x_t
    if p_experts is not None:
        i_e = tl.load(p_experts + i_p).to(tl.int64)
        p_w += i_e * w_e
        p_scale += i_e * s_e
        if p_zero is not None:
            p_zero += i_e * s_e
    p_w += o_r[:, None] * w_n
    at_scale = (o_r // ROWS)[:, None] * s_n
    WORDS: tl.constexpr = K // (8 if FORMAT == "int4" else 4)
    b_y = tl.zeros([BN, BK], tl.float32)
    for i in range(0, WORDS, BK):
        o_w = i + tl.arange(0, BK)
        m = o_w < WORDS
        b_w = tl.load(p_w + o_w[None, :], mask=m[None, :], other=0)
        if FORMAT == "int4":
            o_c = o_w // 8 * 64 + o_w % 8
            HALVES: tl.constexpr = 2 if GROUP == 32 else 1  # groups among a word's columns
            for half in tl.static_range(HALVES):
                at = at_scale + ((o_c + 32 * half) // GROUP)[None, :]
                b_offset = tl.full([BN, BK], 8.0, tl.float32)
                if p_zero is not None:
                    b_offset += tl.load(p_zero + at, mask=m[None, :], other=0).to(tl.float32)
                b_part = _int4(b_w, b_offset, p_x, o_c, m, 8 // HALVES * half, 8 // HALVES)
                b_y += b_part * tl.load(p_scale + at, mask=m[None, :], other=0.0).to(tl.float32)
        else:
            at = at_scale + (o_w * 4 // GROUP)[None, :]
            b_part = _fp8(b_w, p_x, o_w, m) if FORMAT == "fp8" else _int8(b_w, p_x, o_w, m)
            b_y += b_part * tl.load(p_scale + at, mask=m[None, :], other=0.0).to(tl.float32)
    b_o = tl.sum(b_y, axis=1) * (HALF_UP if FORMAT == "fp8" else DOWN)
    tl.store(p_y + i_p.to(tl.int64) * N + o_n, b_o.to(p_y.dtype.element_ty), mask=o_n < N)


def reads(weight: Weight) -> bool:
    """Whether `rows` can read the matrix: it has a scale, and its rows are whole words."""
    return weight.scale is not None and (weight.format == "int4" or weight.shape[-1] % 4 == 0)


def rows(x: Tensor, weight: Weight, dtype: torch.dtype, experts: Tensor | None = None) -> Tensor:
    """x [T, K] times a matrix [N, K] that `reads` allows: [T, N] in `dtype`, summed in float32.

    experts: [P] integers, P a multiple of T; the matrix is then [E, N, K], and the result is [P, N]: product i is of
    row i // (P / T) of x and of matrix experts[i].
    """
    num_channels, size = weight.shape[-2:]
    num_products = x.shape[0] if experts is None else experts.shape[0]
    y = torch.empty(num_products, num_channels, dtype=dtype, device=x.device)
    data, scale = weight.data.view(torch.int32), weight.scale
    assert scale is not None and scale.is_contiguous() and (weight.zero is None or weight.zero.is_contiguous())
    BN = 8 if num_channels >= 4096 else 4
    _rows_kernel[(triton.cdiv(num_channels, BN), num_products)](
        x,
        data,
        scale,
        weight.zero,
        experts,
        y,
        num_channels,
        x.stride(0),
        data.stride(0),
        data.stride(-2),
        scale.stride(0),
        scale.stride(-2),
        PER_ROW=num_products // x.shape[0],
        FORMAT=weight.format,
        K=size,
        ROWS=weight.block[0],
        GROUP=weight.block[1],
        BN=BN,
        BK=256,
        num_warps=4 if weight.format == "fp8" else 2,
    )
    return y
