"""The gated MLP, alone and as an expert that all tokens share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..loading.target import Target
from .build import Build
from .experts import SparseMoe
from .projection import Projection


class DenseMlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, width: int, build: Build) -> None:
        super().__init__()
        self.kernels = build.kernels
        self.gate_up = Projection(hidden_size, {"gate_proj": width, "up_proj": width}, build)
        self.down = Projection(width, {"down_proj": hidden_size}, build)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        return self.down(self.kernels.dense.silu_and_mul(self.gate_up(x)))

    def targets(self, prefix: str) -> Iterator[Target]:
        """`{prefix}gate_proj`, `up_proj` and `down_proj`."""
        yield from self.gate_up.targets(prefix)
        yield from self.down.targets(prefix)


class SharedExpertMlp(nn.Module):
    """c = sigmoid(coefficient x); (1 - c) * mlp(x) + c * shared(x)."""

    def __init__(self, mlp: SparseMoe | DenseMlp, hidden_size: int, width: int, build: Build) -> None:
        super().__init__()
        self.mlp = mlp
        self.shared = DenseMlp(hidden_size, width, build)
        self.coefficient = Projection(hidden_size, {"coefficient": 1}, build, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        c = torch.sigmoid(self.coefficient(x.float())).to(x.dtype)
        return torch.lerp(self.mlp(x), self.shared(x), c)

    def targets(self, layer: str) -> Iterator[Target]:
        yield from self.mlp.targets(f"{layer}mlp.")
        yield from self.shared.targets(f"{layer}shared_mlp.")
        yield from self.coefficient.targets(layer)
