"""Steps of decoding rows that follow one another, without a look at every row.

Most steps have the rows of the step before, each one token on. So each row says in which step something happens to it:
it begins a block, or leaves because all that it will be fed has been. Other steps ask nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..memory.blocks import BlockManager
from ..sequence import Sequence, Status


class ContinuedStep(NamedTuple):
    """What makes a step out of the one before: every row that stays is one token on."""

    before: list[Sequence]  # the rows of the step before: the list of its batch
    rows: list[Sequence]  # of this step; the same list when all have stayed
    kept: list[int] | None  # which of those before are left; None = all
    new_block_rows: list[int]  # rows of this step whose token is the first of a block, increasing


class Continuation:
    """Call `follow` after every step that is scheduled otherwise, then `advance` until it returns None. `advance` also
    gives rows the blocks that they enter, out of those that `make_room` frees."""

    def __init__(self, blocks: BlockManager, make_room: Callable[[int], bool]) -> None:
        self._blocks = blocks
        self._make_room = make_room
        self._rows: list[Sequence] = []  # of the last step; empty = the next one must be scheduled anew
        self._places: dict[Sequence, int] = {}  # in these
        self._left: set[Sequence] = set()  # finished since that step
        self._due: dict[int, list[Sequence]] = {}  # step -> rows to look at in it; each row once, in order
        self._step = 0
        self._has_begun = False

    def follow(self, rows: list[Sequence], num_prefills: int, running: list[Sequence]) -> None:
        """Note a step that was scheduled anew, before its tokens are counted as computed. The next one can follow from
        it if it holds the next token of every running sequence that is to get one, and nothing else."""
        may_continue = not num_prefills and (
            len(rows) == len(running) or len(rows) == sum([s.num_uncomputed_tokens > 0 for s in running])
        )
        self._rows = rows if may_continue else []
        self._has_begun = False
        self._left.clear()
        self._due.clear()
        self._places.clear()

    def leave(self, sequence: Sequence) -> None:
        """It has finished."""
        self._left.add(sequence)

    def advance(self) -> ContinuedStep | None:
        """The next step, or None: it must be scheduled anew. The caller knows that no waiting sequence may start."""
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
        """Ask every row once. False where a grammar has to see each token before the next step."""
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
        """Note when something happens to the sequence, so many steps from this one at the earliest."""
        position = sequence.num_computed_tokens + steps
        steps += min(-position % self._blocks.block_size, sequence.max_fed - position)
        self._due.setdefault(self._step + steps, []).append(sequence)

    def _remove_left(self) -> list[int] | None:
        """Rows that are left, or None when all are."""
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
