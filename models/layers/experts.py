"""Mixture of experts: a router chooses a few MLPs for each token."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ...kernels.bundles import Weight
from ..loading.target import Target
from ..specs import ExpertsSpec
from .build import Build
from .router import build_router


class SparseMoe(nn.Module):
    """The sum over a token's experts of weight * down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, spec: ExpertsSpec, build: Build) -> None:
        super().__init__()
        self.experts = build.kernels.experts
        self.shard = build.shard
        self.num_experts = spec.num_experts
        self.width = spec.width
        self.router = build_router(hidden_size, spec, build)
        self.gate_up = build.parameter(spec.num_experts, 2 * spec.width, hidden_size)
        self.down = build.parameter(spec.num_experts, hidden_size, spec.width)
        self.matrices = Weight(self.gate_up), Weight(self.down)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        return self.shard.sum(self.experts.moe(x, *self.matrices, *self.router(x)))

    def targets(self, prefix: str) -> Iterator[Target]:
        """Per-expert names, and the fused ones ([E, 2F, d] gate rows first, [E, d, F]) that cover them."""
        yield from self.router.targets(prefix)
        for e in range(self.num_experts):
            yield Target(f"{prefix}experts.{e}.gate_proj.weight", self.gate_up[e, : self.width])
            yield Target(f"{prefix}experts.{e}.up_proj.weight", self.gate_up[e, self.width :])
            yield Target(f"{prefix}experts.{e}.down_proj.weight", self.down[e])
        yield Target(f"{prefix}experts.gate_up_proj", self.gate_up, self._pieces(prefix, "gate_proj", "up_proj"))
        yield Target(f"{prefix}experts.down_proj", self.down, self._pieces(prefix, "down_proj"))

    def _pieces(self, prefix: str, *names: str) -> tuple[str, ...]:
        return tuple(f"{prefix}experts.{e}.{name}.weight" for e in range(self.num_experts) for name in names)
