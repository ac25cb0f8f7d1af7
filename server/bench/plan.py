"""What `leyden bench http` is to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .flags import Span
from .goodput import Bound
from .load import Load, Workload


@dataclass(frozen=True)
class Background:
    """Requests that arrive while a case runs, and are not in its latencies."""

    rate: float
    prompt_tokens: Span
    max_tokens: Span


@dataclass(frozen=True)
class Plan:
    """What to measure. `workload.name` is filled in for each case."""

    workload: Workload
    loads: Sequence[Load]
    bounds: Sequence[Bound]
    background: Background | None
    num_workers: int | None
    warm_up_rounds: int
    timeout: float
