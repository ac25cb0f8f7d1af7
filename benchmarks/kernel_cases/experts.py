"""A layer of experts."""

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
