"""Mixture of experts: a router chooses a few MLPs for each token."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..loading.target import Target, place
from ..specs import ExpertsSpec
from .build import Build, Matrices
from .router import build_router


class SparseMoe(Matrices):
    """The sum over a token's experts of weight * down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, spec: ExpertsSpec, build: Build) -> None:
        super().__init__()
        self.experts = build.kernels.experts
        self.shard = build.shard
        self.num_experts = spec.num_experts
        self.width = spec.width
        self.router = build_router(hidden_size, spec, build)
        self.part = build.part
        names = self._pieces("", "gate_proj", "up_proj"), self._pieces("", "down_proj")
        formats = (
            build.format((*names[0], "experts.gate_up_proj"), (spec.width, spec.width), hidden_size),
            build.format((*names[1], "experts.down_proj"), (hidden_size,), spec.width),
        )
        gate_up = build.matrix(formats[0], spec.num_experts, 2 * spec.width, hidden_size)
        down = build.matrix(formats[1], spec.num_experts, hidden_size, spec.width)
        self.gate_up, self.gate_up_scale, self.gate_up_zero, _ = gate_up
        self.down, self.down_scale, self.down_zero, _ = down
        self.matrices = self.weights = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        return self.shard.sum(self.experts.moe(x, *self.matrices, *self.router(x)))

    def targets(self, prefix: str) -> Iterator[Target]:
        """Per-expert names, and the fused ones ([E, 2F, d] gate rows first, [E, d, F]) that cover them."""
        yield from self.router.targets(prefix)
        gate_up, down = self.matrices
        for e in range(self.num_experts):
            both = gate_up.expert(e)
            yield Target(f"{prefix}experts.{e}.gate_proj.weight", place(both.rows(0, self.width)))
            yield Target(f"{prefix}experts.{e}.up_proj.weight", place(both.rows(self.width, self.width)))
            yield Target(f"{prefix}experts.{e}.down_proj.weight", place(down.expert(e)))
        yield Target(f"{prefix}experts.gate_up_proj", place(gate_up), self._pieces(prefix, "gate_proj", "up_proj"))
        yield Target(f"{prefix}experts.down_proj", place(down), self._pieces(prefix, "down_proj"))

    def _pieces(self, prefix: str, *names: str) -> tuple[str, ...]:
        return tuple(f"{prefix}experts.{e}.{name}.weight" for e in range(self.num_experts) for name in names)
