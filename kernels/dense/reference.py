"""Products, norms and activations in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundles import Weight
from .contract import GateActivation


def linear(x: Tensor, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N]. Contract: `Dense.linear`."""
    dtype = dtype or x.dtype
    return F.linear(x.to(dtype), weight.dequantised(x.dtype).to(dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] -> [..., d] (Zhang and Sennrich 2019). Contract: `Dense.rms_norm`."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) with h = alpha * residual + beta * x. Contract: `Dense.add_rms_norm`."""
    if x.dtype == torch.float32 and alpha == 1.0:
        h = torch.add(residual, x, alpha=beta)
    else:
        h = torch.add(residual.float() * alpha, x.float(), alpha=beta).to(x.dtype)
    return rms_norm(h, weight, eps), h


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    num_groups: int = 1,
    activation: GateActivation = "sigmoid",
) -> Tensor:
    """x, gate [T, W] -> [T, W]. Contract: `Dense.gated_rms_norm`."""
    groups = x.float().unflatten(-1, (num_groups, -1))
    width = groups.shape[-1]
    normed = F.rms_norm(groups, (width,), None, eps).mul_(weight.view(-1, width)).flatten(-2)
    activate = F.silu if activation == "silu" else torch.sigmoid
    return normed.mul_(activate(gate.float())).to(x.dtype)


def gate_(x: Tensor, gate: Tensor) -> Tensor:
    """x, gate [T, H, D]; x in place. Contract: `Dense.gate_`."""
    if x.dtype == torch.float32:
        return x.mul_(torch.sigmoid(gate))
    return x.copy_(x.float().mul_(torch.sigmoid(gate.float())))


def join(x: Tensor, coefficient: Tensor, y: Tensor, shared: Tensor, *, is_mixed: bool) -> Tensor:
    """x, y, shared [T, d] -> [T, d]. Contract: `Dense.join`."""
    c = torch.sigmoid(F.linear(x.float(), coefficient))
    joined = torch.lerp(y.float(), shared.float(), c) if is_mixed else torch.addcmul(y.float(), shared.float(), c)
    return joined.to(y.dtype)


def silu_(x: Tensor) -> Tensor:
    """x [T, W] in place. Contract: `Dense.silu_`."""
    return F.silu(x, inplace=True)


def silu_and_mul(x: Tensor) -> Tensor:
    """x [T, 2F] = [gate | up] -> silu(gate) * up, [T, F] (SwiGLU, Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    if x.dtype == torch.float32:
        return F.silu(gate).mul_(up)
    return F.silu(gate.float()).mul_(up).to(x.dtype)
