"""The root-mean-square norm, alone and fused with the operations around it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...kernels.bundles import HeadNorm
from ...kernels.dense.contract import GateActivation
from ..loading.target import Target
from ..specs import NormSpec
from .build import Build


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dim (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, spec: NormSpec, build: Build) -> None:
        super().__init__()
        self.spec = spec
        self.eps = spec.eps
        self.dense = build.kernels.dense
        self.weight = _weight(size, spec, build)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, size] -> norm(x)."""
        return self.dense.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        """(norm(h), h) with h = alpha * residual + beta * x."""
        return self.dense.add_rms_norm(x, residual, self.weight, self.eps, alpha, beta)

    def gated(self, x: Tensor, gate: Tensor, num_groups: int = 1, activation: GateActivation = "sigmoid") -> Tensor:
        """norm(x) * activation(gate), with statistics of each of `num_groups` equal parts of x. x, gate: [T, W]; the
        norm's size is W or W / num_groups."""
        return self.dense.gated_rms_norm(x, gate, self.weight, self.eps, num_groups, activation)

    def targets(self, name: str) -> Iterator[Target]:
        """`{name}.weight`."""
        yield _target(name, self.weight, self.spec)


class QkNorm(nn.Module):
    """An RMS norm of each head's query and key, which the kernels compute as they rotate."""

    def __init__(self, head_dim: int, spec: NormSpec, build: Build) -> None:
        super().__init__()
        self.spec = spec
        self.query = _weight(head_dim, spec, build)
        self.key = _weight(head_dim, spec, build)
        self.bundle = HeadNorm(self.query, self.key, spec.eps)

    def targets(self, prefix: str) -> Iterator[Target]:
        """`{prefix}q_norm.weight` and `{prefix}k_norm.weight`."""
        yield _target(f"{prefix}q_norm", self.query, self.spec)
        yield _target(f"{prefix}k_norm", self.key, self.spec)


def build_qk_norm(head_dim: int, spec: NormSpec | None, build: Build) -> QkNorm | None:
    """None for no spec."""
    return None if spec is None else QkNorm(head_dim, spec, build)


def _weight(size: int, spec: NormSpec, build: Build) -> nn.Parameter:
    """float32 for a weight that is a sum with 1: bfloat16 would round off half of the stored digits or more."""
    return build.parameter(size, dtype=torch.float32 if spec.is_zero_centred else None)


def _target(name: str, weight: nn.Parameter, spec: NormSpec) -> Target:
    return Target(f"{name}.weight", weight, plus=1.0 if spec.is_zero_centred else 0.0)
