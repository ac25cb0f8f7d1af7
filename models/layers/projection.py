"""The parts every family is made of. Each holds its parameters, and says which checkpoint tensors fill them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...kernels import Kernels
from ..loading.weights import Target

ROTARY_PIECE = 1 << 16  # positions whose float64 angles exist at once


def parameter(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Uninitialised and without gradient: `weights.load_weights` fills it or fails."""
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)


class Projection(nn.Module):
    """One matrix [sum of rows, in] that stands for several projections of the same input.

    pieces: checkpoint name -> rows, in the order of the output channels.
    """

    def __init__(
        self, in_features: int, pieces: dict[str, int], kernels: Kernels, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.pieces = pieces
        self.kernels = kernels
        self.weight = parameter(sum(pieces.values()), in_features, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        return self.kernels.linear(x, self.weight)

    def targets(self, prefix: str) -> Iterator[Target]:
        start = 0
        for name, rows in self.pieces.items():
            yield Target(f"{prefix}{name}.weight", self.weight[start : start + rows])
            start += rows


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dim."""

    def __init__(self, size: int, eps: float, kernels: Kernels, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.weight = parameter(size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        """(norm(h), h) with h = alpha * residual + beta * x."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps, alpha, beta)

    def gated(self, x: Tensor, gate: Tensor) -> Tensor:
        """norm(x) * sigmoid(gate). x, gate: [T, size]."""
        return self.kernels.gated_rms_norm(x, gate, self.weight, self.eps)

    def targets(self, name: str) -> Iterator[Target]:
        yield Target(f"{name}.weight", self.weight)


class RotaryTable:
    """Cosines and sines for every position, [max_positions, R] float32; grown once the context length is known.

    inv_freq_j = theta^{-2j/R} (Su et al. 2021), angles in float64 so that far positions stay exact.
    """

    def __init__(self, rotary_dim: int, theta: float, device: torch.device) -> None:
        self.rotary_dim = rotary_dim
        self.theta = theta
        self.device = device
        self.cos_sin = torch.empty(0, rotary_dim, device=device)

    def reserve(self, max_positions: int) -> None:
        if max_positions <= self.cos_sin.shape[0]:
            return
        inv_freq = self.theta ** (-torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim)
        self.cos_sin = torch.empty(max_positions, self.rotary_dim, device=self.device)
        for start in range(0, max_positions, ROTARY_PIECE):
            end = min(start + ROTARY_PIECE, max_positions)
            angles = torch.arange(start, end, dtype=torch.float64)[:, None] * inv_freq
            self.cos_sin[start:end] = torch.cat([angles.cos(), angles.sin()], dim=-1)

    def nbytes(self, max_positions: int) -> int:
        """Bytes of a table for so many positions."""
        return max_positions * self.rotary_dim * self.cos_sin.element_size()


class DenseMlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(
        self, hidden_size: int, width: int, kernels: Kernels, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.kernels = kernels
        pieces = {"gate_proj": width, "up_proj": width}
        self.gate_up = Projection(hidden_size, pieces, kernels, device=device, dtype=dtype)
        self.down = Projection(width, {"down_proj": hidden_size}, kernels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        return self.down(self.kernels.silu_and_mul(self.gate_up(x)))

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.gate_up.targets(prefix)
        yield from self.down.targets(prefix)
