"""A matrix in 8 or 4 bits -> the same in the inputs' dtype, for products of many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Weight

BN, BK = 8, 512


@triton.jit
def _bytes_kernel(
    p_w, p_scale, p_o, N, K, s_n, ROWS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """fp8 and int8. A program converts [BN, BK]."""
    o_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    o_k = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    m = (o_n < N) & (o_k < K)
    b_w = tl.load(p_w + o_n * K + o_k, mask=m, other=0.0).to(tl.float32)
    b_s = tl.load(p_scale + o_n // ROWS * s_n + o_k // GROUP, mask=m, other=0.0).to(tl.float32)
    tl.store(p_o + o_n * K + o_k, (b_w * b_s).to(p_o.dtype.element_ty), mask=m)


@triton.jit
def _nibbles_kernel(p_w, p_scale, p_zero, p_o, N, K, s_n, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """int4. A program converts [BN, BK] from an eighth as many words."""
    o_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    o_w = (tl.program_id(1) * (BK // 8) + tl.arange(0, BK // 8))[None, :]
    m = (o_n < N) & (o_w < K // 8)
    b_w = tl.load(p_w + o_n * (K // 8) + o_w, mask=m, other=0)
    for i in tl.static_range(8):
        o_k = o_w // 8 * 64 + o_w % 8 + 8 * i
        at = o_n * s_n + o_k // GROUP
        b_v = ((b_w >> (4 * i)) & 0xF).to(tl.float32) - 8.0
        if p_zero is not None:
            b_v -= tl.load(p_zero + at, mask=m, other=0).to(tl.float32)
        b_v *= tl.load(p_scale + at, mask=m, other=0.0).to(tl.float32)
        tl.store(p_o + o_n * K + o_k, b_v.to(p_o.dtype.element_ty), mask=m)


def dequantise(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [.., N, K] in `dtype`, a new tensor; `data` itself where it is plain. As `Weight.dequantised`."""
    scale = weight.scale
    if scale is None:
        return weight.data.to(dtype)
    *leading, rows, size = weight.shape
    out = torch.empty(*leading, rows, size, dtype=dtype, device=weight.device)
    if leading and rows % weight.block[0]:  # blocks of rows begin anew with each expert
        for index in range(leading[0]):
            _convert(weight.expert(index), out[index])
    else:
        _convert(weight, out)
    return out


def _convert(weight: Weight, out: Tensor) -> None:
    """All rows of all leading dims at once: each has scales of its own, or there is one matrix."""
    scale = weight.scale
    assert scale is not None
    size = out.shape[-1]
    num_rows = out.numel() // size
    grid = triton.cdiv(num_rows, BN), triton.cdiv(size, BK)
    group, options = weight.block[1], {"BN": BN, "BK": BK, "num_warps": 4}
    if weight.format == "int4":
        _nibbles_kernel[grid](weight.data, scale, weight.zero, out, num_rows, size, scale.shape[-1], group, **options)
    else:
        _bytes_kernel[grid](weight.data, scale, out, num_rows, size, scale.shape[-1], weight.block[0], group, **options)
