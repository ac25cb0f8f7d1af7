"""x W^T. The bytes of W bound the product of one row, and this kernel reads them faster than cuBLAS does
(`docs/kernels.md`). More rows are left to cuBLAS.

A matrix in 8 or 4 bits is read as it is for up to four rows. For more it becomes a plain one first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Weight
from .dequantise import dequantise
from .quantised_rows import MAX_PRODUCTS, reads, rows


@triton.jit
def _row_kernel(p_x, p_w, p_y, N, w_n, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """A program computes BN channels of y."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    p_w += tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * w_n
    b_y = tl.zeros([BN, BK], tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        b_x = tl.load(p_x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + o_k[None, :], mask=(o_k < K)[None, :], other=0.0, eviction_policy="evict_first")
        # [BN, BK] * [1, BK]
        b_y += b_w.to(tl.float32) * b_x[None, :]
    tl.store(p_y + o_n, tl.sum(b_y, axis=1).to(p_y.dtype.element_ty), mask=o_n < N)


def linear(x: Tensor, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N]. Contract: `Dense.linear`."""
    dtype = dtype or x.dtype
    if 0 < x.shape[0] <= MAX_PRODUCTS and reads(weight):
        return rows(x, weight, dtype)
    matrix = dequantise(weight, x.dtype)
    if x.shape[0] != 1:
        return _many_rows(x, matrix, dtype)
    num_channels, size = matrix.shape
    y = torch.empty(1, num_channels, dtype=dtype, device=x.device)
    BN, BK, stages = _row_tile(size)
    _row_kernel[(triton.cdiv(num_channels, BN),)](
        x, matrix, y, num_channels, matrix.stride(0), K=size, BN=BN, BK=BK, STAGES=stages, num_warps=4
    )
    return y


def _row_tile(size: int) -> tuple[int, int, int]:
    """BN, BK and stages for rows of `size`. A short one is loaded at once: many programs then hide each other's waits.
    A long one passes through a pipeline."""
    return (1, min(2048, triton.next_power_of_2(size)), 1) if size <= 8192 else (8, 512, 3)


def _many_rows(x: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == x.dtype:
        return F.linear(x, matrix)
    if x.device.type == "cuda":
        return torch.mm(x, matrix.t(), out_dtype=dtype)
    return F.linear(x.to(dtype), matrix.to(dtype))  # PyTorch has no such product of CPU tensors
