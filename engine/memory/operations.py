"""Operations on the pools. The host notes them; the device runs them in that order, on the stream of the steps.

A step's operations run before it computes anything, folds first. `StepSave` is the exception: the step itself runs it.
"""

from __future__ import annotations

from typing import NamedTuple


class Fork(NamedTuple):
    """Copy one slot to another, and blocks. Tokens that wait in the source's ring stay behind."""

    source_slot: int
    target_slot: int
    blocks: list[tuple[int, int]]  # (from, to) of the blocks to copy


class Fold(NamedTuple):
    """Add the `num_pending` tokens that wait in a slot's ring to its state."""

    slot: int
    num_pending: int
    num_computed_tokens: int  # of the slot's sequence, those that wait included


class Save(NamedTuple):
    """Copy a slot, in whose ring nothing waits, to a snapshot."""

    slot: int
    snapshot: int


class Restore(NamedTuple):
    """Copy a snapshot to a slot, and blocks."""

    snapshot: int
    slot: int
    blocks: list[tuple[int, int]]


class Move(NamedTuple):
    """Copy a snapshot on the device to one on the host."""

    source: int
    target: int


class StepSave(NamedTuple):
    """Write the state of a prefill row after the first `num_tokens` of its tokens in a step to a snapshot.

    The step's own layers do it, after all other operations of the step.
    """

    row: int
    num_tokens: int
    snapshot: int  # on the device; -1 = padding


Operation = Fold | Fork | Save | Restore | Move


class OperationQueue:
    """Operations that the host has noted and the device has not been given, in their order. The scheduler owns it.

    Writers:
    - during `Scheduler.schedule`: `Reuse` (a prompt at a stop is saved, an admitted sequence is restored, a ring is
      folded) and `Siblings` (forks);
    - between two steps: `Reuse` (the end of an answer is saved) and `Sessions` (moves out of memory that it will load).

    Takers, which launch all that they take, at once and in order:
    - the scheduler, for each batch that has rows. A batch without rows is never launched, so operations stay here;
    - `Sessions`, before it reads or overwrites pool memory: an idle engine has no step that would run them.

    A slot or block that an operation reads may be freed, and given away, while the operation waits here: the operation
    still runs before the new owner's step writes.
    """

    def __init__(self) -> None:
        self._operations: list[Operation] = []

    def add(self, *operations: Operation) -> None:
        self._operations += operations

    def take(self) -> list[Operation]:
        """Return all operations and forget them."""
        operations, self._operations = self._operations, []
        return operations
