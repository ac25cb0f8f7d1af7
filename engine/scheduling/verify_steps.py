"""Steps of verify rows. A verify row is the last token of a sequence, followed by its drafts."""

from __future__ import annotations

from ..memory.operations import OperationQueue
from ..memory.ring import RingRule
from ..prefix.reuse import Reuse
from ..sequence import Sequence
from .speculation import Speculation
from .step import ScheduledBatch


class VerifySteps:
    """Builds steps of verify rows, with as many drafts as free blocks and the token budget allow."""

    def __init__(
        self,
        speculation: Speculation,
        ring: RingRule,
        reuse: Reuse,
        operations: OperationQueue,
        max_num_batched_tokens: int,
    ) -> None:
        self._speculation = speculation
        self._ring = ring
        self._reuse = reuse
        self._cache, self._blocks = reuse.cache, reuse.blocks
        self._operations = operations
        self._max_num_batched_tokens = max_num_batched_tokens

    def schedule(self, rows: list[Sequence]) -> ScheduledBatch | None:
        """A step with drafts for these decode rows, which have blocks for their next token already.

        Returns an empty step if drafts are likely once the host has seen the rows' last tokens, and None if no row has
        drafts. Folds the rings that lack room for their row.
        """
        budget = self._max_num_batched_tokens - len(rows)
        if not budget:
            return None
        if self._speculation.waits(rows):
            return ScheduledBatch([], [], 0)
        if any(row.ends_in_unseen for row in rows):
            return None
        drafts = []
        for row in rows:
            drafts.append(self._fitting(row, self._speculation.drafts(row)[:budget]))
            budget -= len(drafts[-1])
        if not any(drafts):
            return None
        counts = [1 + len(each) for each in drafts]
        for row, count in zip(rows, counts, strict=True):
            if not self._ring.holds(row.num_pending_tokens, count):
                self._reuse.fold(row)
        return ScheduledBatch(rows, counts, len(rows), self._operations.take(), drafts=drafts)

    def _fitting(self, sequence: Sequence, drafts: list[int]) -> list[int]:
        """The first of the drafts, as many as fit into blocks that are free without a preemption. Gives the sequence
        these blocks."""
        total = sequence.num_computed_tokens + 1 + len(drafts)
        if self._cache.make_room(self._blocks.missing(sequence, total)):
            self._blocks.grow(sequence, total)
        return drafts[: len(sequence.block_table) * self._blocks.block_size - sequence.num_computed_tokens - 1]
