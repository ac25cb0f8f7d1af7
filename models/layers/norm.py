"""The root-mean-square norm, alone and fused with the operations around it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ...kernels.bundles import HeadNorm
from ..loading.target import Target
from .build import Build


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dim (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, build: Build) -> None:
        super().__init__()
        self.eps = eps
        self.dense = build.kernels.dense
        self.weight = build.parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, size] -> norm(x)."""
        return self.dense.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        """(norm(h), h) with h = alpha * residual + beta * x."""
        return self.dense.add_rms_norm(x, residual, self.weight, self.eps, alpha, beta)

    def gated(self, x: Tensor, gate: Tensor, num_groups: int = 1) -> Tensor:
        """norm(x) * sigmoid(gate), with statistics of each of `num_groups` equal parts of x. x, gate: [T, size]."""
        return self.dense.gated_rms_norm(x, gate, self.weight, self.eps, num_groups)

    def targets(self, name: str) -> Iterator[Target]:
        """`{name}.weight`."""
        yield Target(f"{name}.weight", self.weight)


class QkNorm(nn.Module):
    """An RMS norm of each head's query and key, which the kernels compute as they rotate."""

    def __init__(self, head_dim: int, eps: float, build: Build) -> None:
        super().__init__()
        self.query = build.parameter(head_dim)
        self.key = build.parameter(head_dim)
        self.bundle = HeadNorm(self.query, self.key, eps)

    def targets(self, prefix: str) -> Iterator[Target]:
        """`{prefix}q_norm.weight` and `{prefix}k_norm.weight`."""
        yield Target(f"{prefix}q_norm.weight", self.query)
        yield Target(f"{prefix}k_norm.weight", self.key)


def build_qk_norm(head_dim: int, eps: float | None, build: Build) -> QkNorm | None:
    """None for an eps of None."""
    return None if eps is None else QkNorm(head_dim, eps, build)
