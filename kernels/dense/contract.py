"""Products, norms and activations around attention and experts."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from ..bundles import Weight

GateActivation = Literal["sigmoid", "silu"]


class Dense(Protocol):
    def linear(self, x: Tensor, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, K] @ weight [N, K]^T -> [T, N]; x contiguous, and of the weight's dtype if that is plain.

        Items of a quantised weight may be rounded to x's dtype. Sums are in float32. `dtype`: of the result; None =
        x's, float32 = the sums as they are.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., d] / sqrt(mean(x^2) + eps) * weight [d], computed in float32 and rounded once to x's dtype.

        Here and below the weight of a norm is of x's dtype or float32.
        """

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, alpha: float, beta: float
    ) -> tuple[Tensor, Tensor]:
        """h = alpha * residual + beta * x; returns (rms_norm(h), h). x, residual: [T, d]."""

    def gated_rms_norm(
        self,
        x: Tensor,
        gate: Tensor,
        weight: Tensor,
        eps: float,
        num_groups: int = 1,
        activation: GateActivation = "sigmoid",
    ) -> Tensor:
        """rms_norm(x) * activation(gate), rounded once; x, gate: [T, W].

        The norm is over each of `num_groups` equal parts of the last dim. weight: [W], or [W / num_groups] for all
        parts alike.
        """

    def gate_(self, x: Tensor, gate: Tensor) -> Tensor:
        """x * sigmoid(gate), in place; x, gate: [T, H, D], x contiguous. Returns x."""

    def join(self, x: Tensor, coefficient: Tensor, y: Tensor, shared: Tensor, *, is_mixed: bool) -> Tensor:
        """y + c * shared with c = sigmoid(coefficient . x), or (1 - c) * y + c * shared where `is_mixed`; computed in
        float32 and rounded once. x, y, shared: [T, d] of one dtype; coefficient: [1, d] float32."""

    def silu_(self, x: Tensor) -> Tensor:
        """x * sigmoid(x), in place; x: [T, W]. Returns x."""

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """x [T, 2F] = [gate | up] -> silu(gate) * up, [T, F]."""
