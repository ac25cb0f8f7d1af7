"""The gated MLP, alone and as an expert that all tokens share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..loading.target import Target
from ..specs import SharedSpec
from .build import Build
from .projection import Projection


class DenseMlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, width: int, build: Build) -> None:
        super().__init__()
        self.dense = build.kernels.dense
        self.gate_up = Projection(hidden_size, {"gate_proj": width, "up_proj": width}, build)
        self.down = Projection(width, {"down_proj": hidden_size}, build, split="in")

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        return self.down(self.dense.silu_and_mul(self.gate_up(x)))

    def targets(self, prefix: str) -> Iterator[Target]:
        """`{prefix}gate_proj`, `up_proj` and `down_proj`."""
        yield from self.gate_up.targets(prefix)
        yield from self.down.targets(prefix)


class SharedExpert(nn.Module):
    """shared(x) beside the output y of a layer's MLP, joined as `SharedSpec.joining` says."""

    def __init__(self, hidden_size: int, spec: SharedSpec, build: Build) -> None:
        super().__init__()
        self.mlp = DenseMlp(hidden_size, spec.width, build.within("shared_mlp.", "mlp"))
        self.dense = build.kernels.dense
        self.is_mixed = spec.joining == "mixed"
        self.coefficient = None if spec.joining == "added" else build.parameter(1, hidden_size, dtype=torch.float32)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y [T, d] -> [T, d]."""
        shared = self.mlp(x)
        if self.coefficient is None:
            return y + shared
        return self.dense.join(x, self.coefficient, y, shared, is_mixed=self.is_mixed)

    def targets(self, layer: str) -> Iterator[Target]:
        """`{layer}shared_mlp.*` and, unless it is added, `{layer}coefficient`."""
        yield from self.mlp.targets(f"{layer}shared_mlp.")
        if self.coefficient is not None:
            yield Target(f"{layer}coefficient.weight", self.coefficient)
