"""Finds blocks for running sequences, if need be by preempting others."""

from __future__ import annotations

from ..memory.slots import SlotManager
from ..prefix.reuse import Reuse
from ..sequence import Sequence, Status
from .waiting import WaitingQueue


class Preemption:
    """Takes blocks from the prefix cache, and then preempts running sequences, the last by priority and arrival first.

    A preempted sequence gives back its slot and all blocks, and waits to be computed again from its tokens. running:
    the scheduler's own list, not a copy.
    """

    def __init__(self, running: list[Sequence], waiting: WaitingQueue, slots: SlotManager, reuse: Reuse) -> None:
        self._running = running
        self._waiting = waiting
        self._slots = slots
        self._reuse = reuse
        self._cache, self._blocks = reuse.cache, reuse.blocks
        self.num_preemptions = 0

    def make_room(self, sequence: Sequence, num_new: int, *scheduled: dict[Sequence, int]) -> bool:
        """Give `sequence` the blocks for num_new more tokens. Removes preempted sequences from `scheduled`, in place.
        Returns False if `sequence` itself was preempted."""
        total = sequence.num_computed_tokens + num_new
        if sequence.status is not Status.RUNNING:  # an earlier row of this step has preempted it
            return False
        while not self._cache.make_room(self._blocks.missing(sequence, total)):
            victim = self._running[-1]
            self.preempt(victim)
            for rows in scheduled:
                rows.pop(victim, None)
            if victim is sequence:
                return False
        self._blocks.grow(sequence, total)
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back the slot and the blocks of a running sequence, and remove it from `running`."""
        self._running.remove(sequence)
        self._blocks.release(sequence)
        self._slots.release(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take back everything from a running sequence, and queue it to be computed again."""
        self.release(sequence)
        sequence.num_computed_tokens = sequence.num_pending_tokens = 0
        self._reuse.pause(sequence)
        sequence.status = Status.WAITING
        self._waiting.add(sequence, was_preempted=True)
        self.num_preemptions += 1
