"""Operations on the pools. The host queues them; the device runs them in that order, on the stream of the steps.

The operations of a step run before it computes anything, folds first. A `StepSave` runs during the step itself.
"""

from __future__ import annotations

from typing import NamedTuple


class Fork(NamedTuple):
    """Copy one slot to another, and some blocks. Does not copy the tokens that wait in the source's ring."""

    source_slot: int
    target_slot: int
    blocks: list[tuple[int, int]]  # (source, target) of each block to copy


class Fold(NamedTuple):
    """Add the `num_pending` tokens that wait in a slot's ring to its state."""

    slot: int
    num_pending: int
    num_computed_tokens: int  # of the slot's sequence, including the pending tokens


class Save(NamedTuple):
    """Copy a slot, whose ring must be empty, to a snapshot."""

    slot: int
    snapshot: int


class Restore(NamedTuple):
    """Copy a snapshot to a slot, and some blocks."""

    snapshot: int
    slot: int
    blocks: list[tuple[int, int]]  # (source, target) of each block to copy


class Move(NamedTuple):
    """Copy a snapshot on the device to a snapshot on the host."""

    source: int
    target: int


class StepSave(NamedTuple):
    """Save the state of a prefill row after the first `num_tokens` of the row's tokens to a snapshot.

    The layers write it while they compute the row, so after all other operations of the step. The saves of a step are
    sorted by row and number of tokens.
    """

    row: int
    num_tokens: int
    snapshot: int  # on the device; -1 = padding


Operation = Fold | Fork | Save | Restore | Move


class OperationQueue:
    """The operations that are not launched yet, in their order. The scheduler owns the queue.

    Writers:
    - during `Scheduler.schedule`: `Reuse` (saves prompts at stops, restores admitted sequences, folds rings) and
      `Siblings` (forks);
    - between two steps: `Reuse` (saves ends of answers) and `Sessions` (moves snapshots out of memory to be loaded).

    A taker launches all operations at once and in order:
    - the scheduler, with each batch that has rows. A batch without rows is never launched and takes nothing;
    - `Sessions`, before it reads or overwrites pool memory. An idle engine has no step that would run the operations.

    A slot or block may be freed and given away while an operation that reads it still waits here. The operation runs
    before the step of the new owner writes.
    """

    def __init__(self) -> None:
        self._operations: list[Operation] = []

    def add(self, *operations: Operation) -> None:
        self._operations += operations

    def take(self) -> list[Operation]:
        """Return all operations and empty the queue."""
        operations, self._operations = self._operations, []
        return operations
