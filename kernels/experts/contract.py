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

    def moe(self, x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum over the chosen experts of weight * down(silu(gate x) * up x).

        x: [T, d]; gate_up: [E, 2F, d], gate rows first; down: [E, d, F]; weights: [T, k] float32; experts: [T, k]
        int64. Returns [T, d] in x's dtype. Raises NotImplementedError for a matrix with a scale.
        """
