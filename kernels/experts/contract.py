"""A mixture of experts: which of them a token takes, and their products."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..bundles import Weight


class Experts(Protocol):
    def route(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The softmax over all experts, its k largest renormalised to a sum of 1; of equal ones any.

        logits: [T, E] float32. Returns weights [T, k] float32, largest first, and experts [T, k] int64.
        """

    def route_groups(
        self, logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The k best experts of the best groups, by sigmoid and bias; of equal ones any.

        s = sigmoid(logits), c = s + bias. The E experts stand in `num_groups` contiguous groups of equal size. A group
        counts by the sum of its two largest c (its only one), and the `top_groups` best stay. Chosen are the k largest
        c of their experts, weighted by s / (sum of the chosen s + 1e-20) * scale: the bias chooses, and weighs nothing.
        DeepSeek-V3 (2024), section 2.1.2.

        logits: [T, E] float32; bias: [E] float32; k <= top_groups * E / num_groups. Returns weights [T, k] float32 and
        experts [T, k] int64, largest c first.
        """

    def moe(self, x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum over the chosen experts of weight * down(silu(gate x) * up x).

        x: [T, d]; gate_up: [E, 2F, d], gate rows first; down: [E, d, F]; weights: [T, k] float32; experts: [T, k]
        int64. Returns [T, d] in x's dtype. Quantised matrices as in `Dense.linear`; each has a format of its own.
        """
