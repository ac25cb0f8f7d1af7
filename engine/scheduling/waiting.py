"""The sequences that wait for a slot and blocks."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from ..sequence import Sequence, Status

MAX_PASSED = 8  # times that a sequence is passed over


class WaitingQueue:
    """Two orders of the same sequences: by priority and arrival, in which it is iterated, and by priority and length of
    the prompt."""

    def __init__(self) -> None:
        self._in_order: list[Sequence] = []
        self._by_length: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._in_order)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._in_order)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._in_order, sequence, key=lambda s: s.order)
        bisect.insort(self._by_length, sequence, key=_length_order)

    def remove(self, sequence: Sequence) -> None:
        self._in_order.remove(sequence)
        self._by_length.remove(sequence)

    def ready(self) -> Iterator[Sequence]:
        """Those that could start, in order."""
        return filter(_is_ready, self._in_order)

    def ready_by_length(self) -> Iterator[Sequence]:
        """The same, the shortest of each priority first."""
        return filter(_is_ready, self._by_length)

    def check_integrity(self) -> None:
        """Both orders hold, of the same sequences, which own nothing. Raises AssertionError."""
        assert self._in_order == sorted(self._in_order, key=lambda s: s.order)
        assert self._by_length == sorted(self._in_order, key=_length_order)
        for sequence in self._in_order:
            assert sequence.status is Status.WAITING
            assert sequence.state_slot is None and not sequence.block_table
            assert sequence.num_computed_tokens == sequence.num_pending_tokens == 0


def is_overdue(sequence: Sequence) -> bool:
    """Whether a waiting sequence is passed over no more."""
    return sequence.was_preempted or sequence.num_passed >= MAX_PASSED


def is_kept_waiting(sequence: Sequence) -> bool:
    """Whether a prompt is under way that will leave the snapshot for which the sequence waits."""
    other = sequence.waits_for
    return other is not None and other.status is Status.RUNNING and sequence.awaited_stop in other.stops


def _is_ready(sequence: Sequence) -> bool:
    """A sequence that has just been preempted first gets the token that is on its way."""
    has_all = not sequence.ends_in_unseen and not sequence.is_verifying
    return sequence.leader is None and sequence.is_ready and has_all


def _length_order(sequence: Sequence) -> tuple[int, int, int]:
    return (sequence.priority, sequence.num_prompt_tokens, sequence.arrival)
