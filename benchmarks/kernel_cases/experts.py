"""A layer of experts, and how a token comes to its own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from leyden.benchmarks.kernel_cases import base
from leyden.benchmarks.kernel_cases.base import Bound, Implementation, Work, generator, in_one_step, normal
from leyden.kernels.bundles import Weight
from torch import Tensor


class MoeInputs(NamedTuple):
    """In the order of `Experts.moe`."""

    x: Tensor  # [T, d]
    gate_up: Tensor  # [E, 2F, d]
    down: Tensor  # [E, d, F]
    weights: Tensor  # [T, k]
    experts: Tensor


@functools.lru_cache(maxsize=1)
def expert_weights(num_experts: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2F, d] and down [E, d, F]; more than an L2 cache holds, so all inputs share them."""
    gate_up = normal(1, num_experts, 2 * width, size).mul_(size**-0.5)
    return gate_up, normal(2, num_experts, size, width).mul_(width**-0.5)


@dataclass(frozen=True)
class MoeCase:
    tokens: int
    num_experts: int = 64
    top_k: int = 4
    size: int = 2048
    width: int = 1408
    group: str = "moe"
    num_steps: int = 1

    @property
    def label(self) -> str:
        return f"T={self.tokens}"

    @property
    def name(self) -> str:
        return f"moe/t{self.tokens}"

    def inputs(self, seed: int, *, checked: bool) -> MoeInputs:
        chances = torch.rand(self.tokens, self.num_experts, generator=generator(seed + 1), device=base.DEVICE)
        weights, experts = chances.topk(self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        x = normal(seed, self.tokens, self.size)
        return MoeInputs(x, *expert_weights(self.num_experts, self.width, self.size), weights, experts)

    def work(self, inputs: MoeInputs) -> Work:
        return self.work_for(num_hit=len(inputs.experts.unique()))

    def work_for(self, num_hit: int) -> Work:
        """Each expert that a token chose is read once; x and y are small beside them, but counted."""
        matrices = 3 * self.size * self.width
        num_bytes = 2 * (num_hit * matrices + 2 * self.tokens * self.size)
        return Work(num_bytes, 2 * self.tokens * self.top_k * matrices)

    def expected(self, inputs: MoeInputs) -> dict[str, Tensor]:
        y = torch.zeros_like(inputs.x, dtype=torch.float64)
        for e in range(self.num_experts):
            token, choice = (inputs.experts == e).nonzero(as_tuple=True)
            gate, up = (inputs.x[token].double() @ inputs.gate_up[e].double().mT).chunk(2, dim=-1)
            rows = F.silu(gate) * up @ inputs.down[e].double().mT
            y.index_add_(0, token, rows * inputs.weights[token, choice, None].double())
        return {"out": y}

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, inputs: MoeInputs) -> Bound:
        kernels = base.our_kernels()
        gate_up, down = Weight(inputs.gate_up), Weight(inputs.down)
        return in_one_step(lambda: (kernels.experts.moe(inputs.x, gate_up, down, inputs.weights, inputs.experts),))


class RoutingInputs(NamedTuple):
    logits: Tensor  # [T, E] float32
    bias: Tensor  # [E] float32


@dataclass(frozen=True)
class RoutingCase:
    """Ring-mini's router: the best experts of the best groups, by sigmoid and bias."""

    tokens: int
    num_experts: int = 256
    num_groups: int = 8
    top_groups: int = 4
    top_k: int = 8
    scale: float = 2.5
    group: str = "routing"
    num_steps: int = 1

    @property
    def label(self) -> str:
        return f"T={self.tokens}"

    @property
    def name(self) -> str:
        return f"routing/t{self.tokens}"

    def inputs(self, seed: int, *, checked: bool) -> RoutingInputs:
        return RoutingInputs(normal(seed, self.tokens, self.num_experts).float(), normal(1, self.num_experts).float())

    def work(self, inputs: RoutingInputs | None = None) -> Work:
        """Logits are read once; weights are float32, experts int64."""
        return Work(self.tokens * (4 * self.num_experts + (4 + 8) * self.top_k))

    def expected(self, inputs: RoutingInputs) -> dict[str, Tensor]:
        """The weights of all experts, [T, E]."""
        scores = inputs.logits.double().sigmoid()
        groups = (scores + inputs.bias.double()).unflatten(1, (self.num_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(self.top_groups, dim=-1).indices
        is_kept = torch.zeros_like(groups[..., 0]).scatter_(1, best, 1.0)
        experts = torch.where(is_kept[..., None] > 0, groups, -torch.inf).flatten(1).topk(self.top_k, dim=-1).indices
        chosen = scores.gather(1, experts)
        return {"out": torch.zeros_like(scores).scatter_(1, experts, chosen / chosen.sum(1, True) * self.scale)}

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, inputs: RoutingInputs) -> Bound:
        kernels = base.our_kernels()
        kept: list[Tensor] = []
        arguments = (self.top_k, self.num_groups, self.top_groups, self.scale)

        def step(_: int) -> None:
            kept[:] = kernels.experts.route_groups(*inputs, *arguments)

        return Bound(step, lambda: (torch.zeros_like(inputs.logits).scatter_(1, kept[1], kept[0]),))
