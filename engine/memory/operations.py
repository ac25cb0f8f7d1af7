"""What has to be done to the pools before a step is computed, in this order and on its stream."""

from __future__ import annotations

from typing import NamedTuple


class Fork(NamedTuple):
    """A sequence takes over what another has computed. Tokens that wait in a ring stay behind."""

    source_slot: int
    target_slot: int
    blocks: list[tuple[int, int]]  # (from, to) of those whose contents are copied


class Fold(NamedTuple):
    """The `num_pending` tokens that wait in a slot's ring go into its state."""

    slot: int
    num_pending: int


class Save(NamedTuple):
    """A slot's state, with nothing waiting in its ring, becomes a checkpoint."""

    slot: int
    checkpoint: int


class Restore(NamedTuple):
    """A sequence resumes at a checkpoint."""

    checkpoint: int
    slot: int
    blocks: list[tuple[int, int]]


class Move(NamedTuple):
    """A checkpoint goes elsewhere: from the device to the host."""

    source: int
    target: int


class Snapshot(NamedTuple):
    """A row's state after the first `num_tokens` of its tokens in a step becomes a checkpoint, while the step runs and
    so after all copies before it."""

    row: int
    num_tokens: int
    checkpoint: int  # on the device; -1 = none, which is padding


Copy = Fold | Fork | Save | Restore | Move
