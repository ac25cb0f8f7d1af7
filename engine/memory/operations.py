"""Operations on the pools. The host notes them; the device runs them in this order, on the stream of the steps.

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
