"""Mixture of experts: a router chooses a few MLPs for each token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...kernels.bundles import Weight
from ..loading.target import Target
from ..specs import MlpSpec
from .build import Build
from .projection import Projection


class SparseMoe(nn.Module):
    """p = softmax(router x) over all experts; the top k, renormalised, weigh down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, spec: MlpSpec, build: Build) -> None:
        super().__init__()
        self.kernels = build.kernels
        self.top_k = spec.top_k
        self.num_experts = spec.num_experts
        self.width = spec.width
        # float32: which experts a token takes is a comparison, and rounding flips near ties.
        self.router = Projection(hidden_size, {"gate": spec.num_experts}, build, dtype=torch.float32)
        self.gate_up = build.parameter(spec.num_experts, 2 * spec.width, hidden_size)
        self.down = build.parameter(spec.num_experts, hidden_size, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, d] -> [T, d]."""
        weights, experts = self.kernels.experts.route(self.router(x.float()), self.top_k)
        return self.kernels.experts.moe(x, Weight(self.gate_up), Weight(self.down), weights, experts)

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
