# ruff: noqa: ANN201 device functions return registers
"""silu(gate) * up, the gate of SwiGLU (Shazeer 2020), and other gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def silu(b_x):
    """x * sigmoid(x), for float32 registers."""
    return b_x / (1.0 + tl.exp(-b_x))


@triton.jit
def _silu_kernel(p_x, x_t, W, BW: tl.constexpr):
    i_t, i_w = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_w = i_w * BW + tl.arange(0, BW)
    p_x += i_t * x_t + o_w
    b_x = tl.load(p_x, mask=o_w < W, other=0.0).to(tl.float32)
    tl.store(p_x, silu(b_x).to(p_x.dtype.element_ty), mask=o_w < W)


@triton.jit
def _silu_and_mul_kernel(p_x, p_y, x_t, F, BF: tl.constexpr):
    i_t, i_f = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_f = i_f * BF + tl.arange(0, BF)
    p_x += i_t * x_t
    b_gate = tl.load(p_x + o_f, mask=o_f < F, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + F + o_f, mask=o_f < F, other=0.0).to(tl.float32)
    tl.store(p_y + i_t * F + o_f, (silu(b_gate) * b_up).to(p_y.dtype.element_ty), mask=o_f < F)


@triton.jit
def _gate_kernel(p_x, p_gate, g_t, g_h, W, D: tl.constexpr, BW: tl.constexpr):
    i_t, i_w = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_w = i_w * BW + tl.arange(0, BW)
    p_x += i_t * W + o_w
    b_gate = tl.load(p_gate + i_t * g_t + o_w // D * g_h + o_w % D, mask=o_w < W, other=0.0).to(tl.float32)
    b_x = tl.load(p_x, mask=o_w < W, other=0.0).to(tl.float32)
    tl.store(p_x, (b_x / (1.0 + tl.exp(-b_gate))).to(p_x.dtype.element_ty), mask=o_w < W)


def gate_(x: Tensor, gate: Tensor) -> Tensor:
    """x, gate [T, H, D]; x in place. Contract: `Dense.gate_`."""
    num_tokens, num_heads, head_dim = x.shape
    if num_tokens:
        width = num_heads * head_dim
        BW = min(1024, triton.next_power_of_2(width))
        grid = (num_tokens, triton.cdiv(width, BW))
        _gate_kernel[grid](x, gate, *gate.stride()[:2], width, D=head_dim, BW=BW, num_warps=4)
    return x


def silu_(x: Tensor) -> Tensor:
    """x [T, W] in place. Contract: `Dense.silu_`."""
    num_tokens, width = x.shape
    if num_tokens:
        BW = min(1024, triton.next_power_of_2(width))
        _silu_kernel[(num_tokens, triton.cdiv(width, BW))](x, x.stride(0), width, BW=BW, num_warps=4)
    return x


def silu_and_mul(x: Tensor) -> Tensor:
    """x [T, 2F] -> [T, F]. Contract: `Dense.silu_and_mul`."""
    num_tokens, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return y
    BF = min(1024, triton.next_power_of_2(width))
    _silu_and_mul_kernel[(num_tokens, triton.cdiv(width, BF))](x, y, x.stride(0), width, BF=BF, num_warps=4)
    return y
