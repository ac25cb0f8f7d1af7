"""Operations around attention: one row times a matrix, norms and activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from leyden.benchmarks.kernel_cases import base
from leyden.benchmarks.kernel_cases.base import Bound, Implementation, Work, in_one_step, normal
from leyden.kernels import Kernels
from leyden.kernels.bundles import Weight
from torch import Tensor


class LinearInputs(NamedTuple):
    """In the order of `Dense.linear`."""

    x: Tensor  # [1, K]
    weight: Tensor  # [N, K], another in every set of inputs


@dataclass(frozen=True)
class LinearCase:
    """x [1, size] @ weight [channels, size]^T."""

    channels: int
    size: int
    group: str = "linear"
    num_steps: int = 1

    @property
    def label(self) -> str:
        return f"{self.channels} x {self.size}"

    @property
    def name(self) -> str:
        return f"linear/{self.channels}x{self.size}"

    def inputs(self, seed: int, *, checked: bool) -> LinearInputs:
        weight = normal(seed + 1, self.channels, self.size).mul_(self.size**-0.5)
        return LinearInputs(normal(seed, 1, self.size), weight)

    def work(self, inputs: LinearInputs | None = None) -> Work:
        """x and y are nothing beside the weight."""
        return Work(2 * self.channels * self.size)

    def expected(self, inputs: LinearInputs) -> dict[str, Tensor]:
        return {"out": inputs.x.double() @ inputs.weight.double().mT}

    def implementations(self) -> dict[str, Implementation]:
        torch_linear = Implementation(lambda inputs: in_one_step(lambda: (F.linear(*inputs),)), is_peer=True)
        return {"leyden": Implementation(self.bind), "torch": torch_linear}

    def bind(self, inputs: LinearInputs) -> Bound:
        kernels = base.our_kernels()
        return in_one_step(lambda: (kernels.dense.linear(inputs.x, Weight(inputs.weight)),))


SILU_WIDTH = 12288  # of silu_'s 16,384 channels: q, k and v; the rest of the projection is the gate
EPS, ALPHA, BETA = 1e-5, 3.5, 1.0


class Operation(NamedTuple):
    """An operation on tensors [T, width] between the large products."""

    widths: tuple[int, ...]  # of the inputs
    num_moved: int  # elements read and written per token
    call: Callable[..., tuple[Tensor, ...]]  # of Kernels, the inputs and the norm's weight if there is one
    expected: Callable[..., dict[str, Tensor]]  # of the same in float64, without Kernels
    has_weight: bool = False


def call_silu_(kernels: Kernels, x: Tensor) -> tuple[Tensor]:
    kernels.dense.silu_(x[:, :SILU_WIDTH])
    return (x,)


def expected_silu_(x: Tensor) -> dict[str, Tensor]:
    """The channels beside stay as they were."""
    return {"out": torch.cat([F.silu(x[:, :SILU_WIDTH]), x[:, SILU_WIDTH:]], dim=1)}


def expected_silu_and_mul(x: Tensor) -> dict[str, Tensor]:
    gate, up = x.chunk(2, dim=-1)
    return {"out": F.silu(gate) * up}


def expected_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight


def expected_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> dict[str, Tensor]:
    h = ALPHA * residual + BETA * x
    return {"out": expected_norm(h, weight), "residual": h}


def expected_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {"out": expected_norm(x, weight) * torch.sigmoid(gate)}


OPERATIONS = {
    "silu_": Operation((16384,), 2 * SILU_WIDTH, call_silu_, expected_silu_),
    "silu_and_mul": Operation(
        (22016,), 22016 + 11008, lambda kernels, x: (kernels.dense.silu_and_mul(x),), expected_silu_and_mul
    ),
    "add_rms_norm": Operation(
        (4096, 4096),
        4 * 4096,
        lambda kernels, *x: kernels.dense.add_rms_norm(*x, EPS, ALPHA, BETA),
        expected_add_rms_norm,
        has_weight=True,
    ),
    "gated_rms_norm": Operation(
        (4096, 4096),
        3 * 4096,
        lambda kernels, *x: (kernels.dense.gated_rms_norm(*x, EPS),),
        expected_gated_rms_norm,
        has_weight=True,
    ),
}


@dataclass(frozen=True)
class AroundCase:
    operation: str  # of OPERATIONS
    tokens: int
    group: str = "around"
    num_steps: int = 1

    @property
    def label(self) -> str:
        return f"{self.operation}, T={self.tokens}"

    @property
    def name(self) -> str:
        return f"around/{self.operation}/t{self.tokens}"

    def inputs(self, seed: int, *, checked: bool) -> tuple[Tensor, ...]:
        """[T, width] each, then the norm's weight [width]."""
        operation = OPERATIONS[self.operation]
        shapes = [(self.tokens, width) for width in operation.widths]
        weights = [operation.widths[:1]] if operation.has_weight else []
        return tuple(normal(seed + i, *shape) for i, shape in enumerate([*shapes, *weights]))

    def work(self, inputs: tuple[Tensor, ...] | None = None) -> Work:
        return Work(2 * self.tokens * OPERATIONS[self.operation].num_moved)

    def expected(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return OPERATIONS[self.operation].expected(*[x.double() for x in inputs])

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, inputs: tuple[Tensor, ...]) -> Bound:
        kernels, call = base.our_kernels(), OPERATIONS[self.operation].call
        return in_one_step(lambda: call(kernels, *inputs))
