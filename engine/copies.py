"""What has to be copied between pools before a step is computed, in this order and on its stream."""

from __future__ import annotations

from typing import NamedTuple


class Fork(NamedTuple):
    """A sequence takes over what another has computed. Tokens that wait in a ring stay behind."""

    source_slot: int
    target_slot: int
    blocks: list[tuple[int, int]]  # (from, to) of those whose contents are copied


class Save(NamedTuple):
    """A slot's state becomes a checkpoint, after `num_pending` tokens of its ring were folded into it."""

    slot: int
    num_pending: int
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


Copy = Fork | Save | Restore | Move
