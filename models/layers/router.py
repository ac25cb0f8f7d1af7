"""Routers: which experts a token takes, and with which weights.

To add one: a route in `models.specs`, an operation in `kernels/experts/contract.py`, and a class here with the same
forward, which `build_router` makes for that route.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..loading.target import Target
from ..specs import ExpertsSpec, SigmoidGroupRoute, SoftmaxRoute
from .build import Build
from .projection import Projection


class SoftmaxRouter(nn.Module):
    """p = softmax(gate x) over all experts; the top k, renormalised."""

    def __init__(self, hidden_size: int, spec: ExpertsSpec, route: SoftmaxRoute, build: Build) -> None:
        super().__init__()
        self.experts = build.kernels.experts
        self.top_k = spec.top_k
        self.dtype = torch.float32 if route.has_float32_gate else build.dtype
        self.gate = Projection(hidden_size, {"gate": spec.num_experts}, build, dtype=self.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, d] -> weights [T, k] float32, experts [T, k] int64."""
        # Sums stay in float32: the choice of experts is a comparison, and rounding flips near ties.
        return self.experts.route(self.gate(x.to(self.dtype), torch.float32), self.top_k)

    def targets(self, prefix: str) -> Iterator[Target]:
        """`{prefix}gate.weight`."""
        yield from self.gate.targets(prefix)


class SigmoidGroupRouter(nn.Module):
    """s = sigmoid(gate x); s + bias chooses groups of experts and the top k in them, s weighs them."""

    def __init__(self, hidden_size: int, spec: ExpertsSpec, route: SigmoidGroupRoute, build: Build) -> None:
        super().__init__()
        self.experts = build.kernels.experts
        self.choice = (spec.top_k, route.num_groups, route.num_kept, route.scale)
        self.gate = Projection(hidden_size, {"gate": spec.num_experts}, build, dtype=torch.float32)
        self.bias = build.parameter(spec.num_experts, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, d] -> weights [T, k] float32, experts [T, k] int64."""
        return self.experts.route_groups(self.gate(x.float()), self.bias, *self.choice)

    def targets(self, prefix: str) -> Iterator[Target]:
        """`{prefix}gate.weight` and `{prefix}gate.expert_bias`."""
        yield from self.gate.targets(prefix)
        yield Target(f"{prefix}gate.expert_bias", self.bias)


def build_router(hidden_size: int, spec: ExpertsSpec, build: Build) -> SoftmaxRouter | SigmoidGroupRouter:
    """The router of `spec.route`."""
    if isinstance(spec.route, SigmoidGroupRoute):
        return SigmoidGroupRouter(hidden_size, spec, spec.route, build)
    return SoftmaxRouter(hidden_size, spec, spec.route, build)
