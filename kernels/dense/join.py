"""The output of an expert that all tokens share, joined to the others' with a weight that the token decides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norm import launch_options


@triton.jit
def _join_kernel(
    p_x, p_coefficient, p_y, p_shared, p_o, x_t, y_t, shared_t, MIXED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_x = tl.load(p_x + i_t * x_t + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + i_t * y_t + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_shared = tl.load(p_shared + i_t * shared_t + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_c = tl.sigmoid(tl.sum(b_x * tl.load(p_coefficient + o_d, mask=m_d, other=0.0)))
    if MIXED:
        b_y += b_c * (b_shared - b_y)
    else:
        b_y += b_c * b_shared
    tl.store(p_o + i_t * D + o_d, b_y.to(p_o.dtype.element_ty), mask=m_d)


def join(x: Tensor, coefficient: Tensor, y: Tensor, shared: Tensor, *, is_mixed: bool) -> Tensor:
    """x, y, shared [T, d] -> [T, d], a new contiguous tensor. Contract: `Dense.join`."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if x.shape[0]:
        strides = x.stride(0), y.stride(0), shared.stride(0)
        options = launch_options(x.shape[1])
        _join_kernel[(x.shape[0],)](x, coefficient, y, shared, out, *strides, MIXED=is_mixed, **options)
    return out
