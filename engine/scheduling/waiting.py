"""The sequences that wait for a slot and blocks."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..sequence import Sequence, Status

MAX_PASSED = 8  # times that later sequences may pass over one sequence


@dataclass(slots=True)
class _Wait:
    deadline: float  # on the monotonic clock; a sequence that has not started by then is refused
    was_preempted: bool
    num_passed: int = 0  # times that a later sequence was admitted before this one


class WaitingQueue:
    """The waiting sequences in two orders: by priority and arrival (the order of iteration), and by priority and prompt
    length. may_start: whether a sequence lacks nothing but room."""

    def __init__(self, may_start: Callable[[Sequence], bool]) -> None:
        self._may_start = may_start
        self._in_order: list[Sequence] = []
        self._by_length: list[Sequence] = []
        self._waits: dict[Sequence, _Wait] = {}

    def __len__(self) -> int:
        return len(self._in_order)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._in_order)

    def add(self, sequence: Sequence, deadline: float = math.inf, *, was_preempted: bool = False) -> None:
        bisect.insort(self._in_order, sequence, key=lambda s: s.order)
        bisect.insort(self._by_length, sequence, key=_length_order)
        self._waits[sequence] = _Wait(deadline, was_preempted)

    def remove(self, sequence: Sequence) -> None:
        self._in_order.remove(sequence)
        self._by_length.remove(sequence)
        del self._waits[sequence]

    def ready(self) -> Iterator[Sequence]:
        """The sequences that may start, by priority and arrival."""
        return filter(self._may_start, self._in_order)

    def ready_by_length(self) -> Iterator[Sequence]:
        """The sequences that may start, by priority and prompt length."""
        return filter(self._may_start, self._by_length)

    def deadline(self, sequence: Sequence) -> float:
        """The sequence's deadline; infinite if it has started."""
        return self._waits[sequence].deadline if sequence in self._waits else math.inf

    def waive_deadline(self, sequence: Sequence) -> None:
        self._waits[sequence].deadline = math.inf

    def late(self, now: float) -> list[Sequence]:
        """The sequences whose deadline has passed."""
        return [sequence for sequence in self._in_order if self._waits[sequence].deadline < now]

    def pass_over(self, sequence: Sequence) -> None:
        """Count that a later sequence is admitted before this one."""
        self._waits[sequence].num_passed += 1

    def num_passed(self, sequence: Sequence) -> int:
        return self._waits[sequence].num_passed

    def was_preempted(self, sequence: Sequence) -> bool:
        return self._waits[sequence].was_preempted

    def is_overdue(self, sequence: Sequence) -> bool:
        """Whether no later sequence may pass over this one any more."""
        wait = self._waits[sequence]
        return wait.was_preempted or wait.num_passed >= MAX_PASSED

    def check_integrity(self) -> None:
        """Both orders hold the same sequences, sorted, and none of them owns a slot or a block. Raises
        AssertionError."""
        assert self._in_order == sorted(self._in_order, key=lambda s: s.order)
        assert self._by_length == sorted(self._in_order, key=_length_order)
        assert self._waits.keys() == set(self._in_order)
        for sequence in self._in_order:
            assert sequence.status is Status.WAITING
            assert sequence.state_slot is None and not sequence.block_table
            assert sequence.num_computed_tokens == sequence.num_pending_tokens == 0


def _length_order(sequence: Sequence) -> tuple[int, int, int]:
    return (sequence.priority, sequence.num_prompt_tokens, sequence.arrival)
