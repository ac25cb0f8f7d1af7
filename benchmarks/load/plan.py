"""The cases that `leyden bench http` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .flags import Span
from .goodput import Bound
from .load import Load, Workload


@dataclass(frozen=True)
class Background:
    """Requests that arrive while a case runs. Its latencies do not include theirs."""

    rate: float
    prompt_tokens: Span
    max_tokens: Span

    @property
    def name(self) -> str:
        return f"{self.rate:g} requests/s of {self.prompt_tokens} tokens"


@dataclass(frozen=True)
class Case:
    """A load, alone or beside background requests."""

    load: Load
    background: Background | None = None

    @property
    def name(self) -> str:
        return self.load.name + (f" beside {self.background.name}" if self.background is not None else "")


@dataclass(frozen=True)
class Plan:
    """Everything to measure. The measurement sets `workload.name` for each case."""

    workload: Workload
    cases: Sequence[Case]
    bounds: Sequence[Bound]
    num_workers: int | None
    warm_up_rounds: int
    timeout: float

    @property
    def has_background(self) -> bool:
        return any(case.background is not None for case in self.cases)

    @property
    def largest_load(self) -> float:
        """Streams, or requests per second."""
        return max(case.load.concurrency or case.load.rate or 0.0 for case in self.cases)
