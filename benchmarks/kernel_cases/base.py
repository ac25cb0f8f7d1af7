"""The parts of a case: inputs, the least that a call must do, results in float64, and implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from leyden.kernels import Kernels, load
from torch import Tensor

DEVICE, DTYPE = "cuda", torch.bfloat16


def our_kernels() -> Kernels:
    return load("triton")


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE, generator=generator(seed))


class Limits(NamedTuple):
    """Rates that the device reaches, per second: bytes copied (read and written), bfloat16 matrix operations."""

    bytes_per_s: float
    flops_per_s: float


class Work(NamedTuple):
    """The least that one call must do."""

    num_bytes: float
    flops: float = 0.0

    def floor_us(self, limits: Limits) -> float:
        return 1e6 * max(self.num_bytes / limits.bytes_per_s, self.flops / limits.flops_per_s)


class Bound(NamedTuple):
    """An implementation bound to one set of inputs."""

    step: Callable[[int], object]  # step i, which is timed
    results: Callable[[], tuple[Tensor, ...]]  # after all steps, in the order of the case's `expected`
    capturable: bool = True


class Implementation(NamedTuple):
    bind: Callable[[Any], Bound]
    is_peer: bool = False


def in_one_step(call: Callable[[], tuple[Tensor, ...]]) -> Bound:
    """A kernel that returns its results, in the order of the case's `expected`."""
    kept: list[Tensor] = []

    def step(_: int) -> None:
        kept[:] = call()

    return Bound(step, lambda: tuple(kept))


class Case(Protocol):
    """One shape: its inputs, their results in float64, and implementations."""

    @property
    def group(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def num_steps(self) -> int: ...

    def inputs(self, seed: int, *, checked: bool) -> Any:
        """Random inputs on the GPU, outputs poisoned. Equal seeds give equal inputs."""

    def work(self, inputs: Any) -> Work:
        """Of one step."""

    def expected(self, inputs: Any) -> dict[str, Tensor]:
        """Results in float64."""

    def implementations(self) -> dict[str, Implementation]: ...
