"""RMSNorm (Zhang and Sennrich 2019): alone, fused with the residual sum before it, fused with the gate after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import GateActivation

MOST_ELEMENTS = 2048  # of several groups in one program


@triton.jit
def _normalise(b_x, b_w, eps, D: tl.constexpr):
    return b_x * tl.rsqrt(tl.sum(b_x * b_x) / D + eps) * b_w


@triton.jit
def _rms_norm_kernel(p_x, p_w, p_y, eps, N, x_m, x_n, D: tl.constexpr, BD: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    p_x += i_row // N * x_m + i_row % N * x_n
    b_x = tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_w = tl.load(p_w + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    tl.store(p_y + i_row * D + o_d, _normalise(b_x, b_w, eps, D).to(p_y.dtype.element_ty), mask=o_d < D)


@triton.jit
def _add_rms_norm_kernel(p_x, p_r, p_w, p_y, p_h, eps, alpha, beta, x_t, r_t, D: tl.constexpr, BD: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_x = tl.load(p_x + i_t * x_t + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_r = tl.load(p_r + i_t * r_t + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_w = tl.load(p_w + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_h = (alpha * b_r + beta * b_x).to(p_h.dtype.element_ty)
    tl.store(p_h + i_t * D + o_d, b_h, mask=o_d < D)
    b_y = _normalise(b_h.to(tl.float32), b_w, eps, D)
    tl.store(p_y + i_t * D + o_d, b_y.to(p_y.dtype.element_ty), mask=o_d < D)


@triton.jit
def _gated_rms_norm_kernel(
    p_x,
    p_gate,
    p_w,
    p_y,
    eps,
    x_t,
    g_t,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    IS_SHARED: tl.constexpr,
    IS_SILU: tl.constexpr,
):
    """A program takes BG groups of a token. D: width of one group; IS_SHARED: one weight [D] for all groups."""
    i_t = tl.program_id(0).to(tl.int64)
    o_g, o_d = tl.program_id(1) * BG + tl.arange(0, BG), tl.arange(0, BD)
    o_w = o_g[:, None] * D + o_d[None, :]
    m = (o_g < GROUPS)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + i_t * x_t + o_w, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + i_t * g_t + o_w, mask=m, other=0.0).to(tl.float32)
    if IS_SHARED:
        b_w = tl.load(p_w + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    else:
        b_w = tl.load(p_w + o_w, mask=m, other=0.0).to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)
    b_y = b_x * b_scale[:, None] * b_w / (1.0 + tl.exp(-b_gate))
    if IS_SILU:
        b_y *= b_gate
    tl.store(p_y + i_t * (GROUPS * D) + o_w, b_y.to(p_y.dtype.element_ty), mask=m)


def launch_options(size: int, count: int = 1) -> dict[str, int]:
    """A program takes `count` rows, a thread 16 elements: two loads of 16 bytes in half precision."""
    block = triton.next_power_of_2(size)
    return {"D": size, "BD": block, "num_warps": min(16, max(1, count * block // 512))}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d], weight [d] -> a new contiguous tensor. Contract: `Dense.rms_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    # [..., d] as [M, N, d], so that a view of heads inside a projection needs no copy
    wide = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
    _rms_norm_kernel[(wide.shape[0] * wide.shape[1],)](
        wide, weight, y, eps, wide.shape[1], *wide.stride()[:2], **launch_options(x.shape[-1])
    )
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """x, residual [T, d] -> (rms_norm(h), h), new contiguous tensors. Contract: `Dense.add_rms_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y)
    if x.shape[0]:
        _add_rms_norm_kernel[(x.shape[0],)](
            x,
            residual,
            weight,
            y,
            h,
            eps,
            float(alpha),
            float(beta),
            x.stride(0),
            residual.stride(0),
            **launch_options(x.shape[1]),
        )
    return y, h


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    num_groups: int = 1,
    activation: GateActivation = "sigmoid",
) -> Tensor:
    """x, gate [T, W] -> [T, W], a new contiguous tensor. Contract: `Dense.gated_rms_norm`."""
    num_tokens, width = x.shape[0], x.shape[1] // num_groups
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        BG = min(triton.next_power_of_2(num_groups), max(1, MOST_ELEMENTS // triton.next_power_of_2(width)))
        _gated_rms_norm_kernel[(num_tokens, triton.cdiv(num_groups, BG))](
            x,
            gate,
            weight,
            y,
            eps,
            x.stride(0),
            gate.stride(0),
            GROUPS=num_groups,
            BG=BG,
            IS_SHARED=num_groups > 1 and weight.shape[0] == width,
            IS_SILU=activation == "silu",
            **launch_options(width, BG),
        )
    return y
