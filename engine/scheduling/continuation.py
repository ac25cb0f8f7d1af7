"""Consecutive steps of the same decode rows, made without a look at every row.

Most steps have the rows of the step before, each one token further. A row needs attention in two steps only: when its
token is the first of a block, and when its last token has been fed. Each row is noted under the next such step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..memory.blocks import BlockManager
from ..sequence import Sequence, Status


class ContinuedStep(NamedTuple):
    """The difference between a step and the step before it. Every row that stays is one token further."""

    before: list[Sequence]  # rows of the step before; the very list of its batch
    rows: list[Sequence]  # rows of this step; the same list as `before` if all have stayed
    kept: list[int] | None  # indices into `before` of the rows that stay, increasing; None = all
    new_block_rows: list[int]  # indices into `rows` whose token is the first of a block, increasing


class Continuation:
    """Call `follow` after every step that the scheduler builds itself. Then call `advance` until it returns None.
    `advance` also allocates the KV blocks that rows enter. make_room: frees so many blocks, False if it cannot."""

    def __init__(self, blocks: BlockManager, make_room: Callable[[int], bool]) -> None:
        self._blocks = blocks
        self._make_room = make_room
        self._rows: list[Sequence] = []  # of the last step; empty = the scheduler must build the next one
        self._places: dict[Sequence, int] = {}  # index of each sequence in `_rows`
        self._left: set[Sequence] = set()  # finished since that step
        self._due: dict[int, list[Sequence]] = {}  # step -> its rows that need attention; each row is noted once
        self._step = 0
        self._has_begun = False

    def follow(self, rows: list[Sequence], num_prefills: int, running: list[Sequence]) -> None:
        """Note a step that the scheduler has built, before `Scheduler.update` counts its tokens as computed. The next
        step can continue it if it has no prefill rows, and a decode row for every running sequence that is behind."""
        may_continue = not num_prefills and (
            len(rows) == len(running) or len(rows) == sum([s.num_uncomputed_tokens > 0 for s in running])
        )
        self._rows = rows if may_continue else []
        self._has_begun = False
        self._left.clear()
        self._due.clear()
        self._places.clear()

    def leave(self, sequence: Sequence) -> None:
        """Note that the sequence has finished."""
        self._left.add(sequence)

    def advance(self) -> ContinuedStep | None:
        """The next step. None if the scheduler must build it. The caller has checked that no waiting sequence may
        start."""
        if not self._rows or not (self._has_begun or self._begin()):
            return None
        beginning = []
        for sequence in self._due.pop(self._step, ()):
            if sequence.num_computed_tokens == sequence.max_fed:
                self._left.add(sequence)
            elif sequence.status is Status.RUNNING:
                beginning.append(sequence)
        before, kept = self._rows, self._remove_left()
        block_size = self._blocks.block_size
        missing = [s for s in beginning if len(s.block_table) * block_size <= s.num_computed_tokens]
        if not self._rows or not self._make_room(len(missing)):
            self._rows = []
            return None
        new_block_rows = [self._places[sequence] for sequence in beginning]
        for row in new_block_rows:
            sequence = self._rows[row]
            self._blocks.grow(sequence, sequence.num_computed_tokens + 1)
            self._await(sequence, 1)
        self._step += 1
        return ContinuedStep(before, self._rows, kept, new_block_rows)

    def _begin(self) -> bool:
        """Note every row under its next due step. False if a row has a grammar: it must see each token before the next
        step."""
        if any(sequence.grammar is not None for sequence in self._rows):
            self._rows = []
            return False
        self._step = 0
        for sequence in self._rows:
            self._await(sequence, 0)
        self._find_places()
        self._has_begun = True
        return True

    def _await(self, sequence: Sequence, steps: int) -> None:
        """Note the next step in which the row needs attention, at the earliest `steps` after this one."""
        position = sequence.num_computed_tokens + steps
        steps += min(-position % self._blocks.block_size, sequence.max_fed - position)
        self._due.setdefault(self._step + steps, []).append(sequence)

    def _remove_left(self) -> list[int] | None:
        """Remove the rows that have left. Returns the indices of the others, None if none has left."""
        before, left = self._rows, self._left
        if not any(sequence in self._places for sequence in left):
            left.clear()
            return None
        kept = [row for row, sequence in enumerate(before) if sequence not in left]
        self._rows = [before[row] for row in kept]
        self._find_places()
        left.clear()
        return kept

    def _find_places(self) -> None:
        self._places = {sequence: row for row, sequence in enumerate(self._rows)}
