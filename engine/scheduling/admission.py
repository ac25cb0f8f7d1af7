"""Which waiting sequences start.

A waiting sequence is admitted in the order of `prompt_order.py`, once a state slot and KV blocks for all of its tokens
are free. There are three exceptions:
- If a running prompt of no lower priority will soon save a snapshot of a shared prefix, the sequence waits for it.
- At most `MAX_PASSED` later sequences pass over the first of the queue. Then the first is admitted next.
- If too few blocks are free for the first of the queue, later sequences of its priority start only if they leave it
  enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

from ..memory.slots import SlotManager
from ..prefix.cache import Match
from ..prefix.reuse import NOTHING, Reuse
from ..sequence import Sequence
from .prompt_order import PromptOrder
from .siblings import Siblings
from .waiting import WaitingQueue

NUM_COMPARED = 8  # candidates from each order of the queue; the one with the fewest tokens left to compute is next
NUM_EXAMINED = 32  # sequences looked at in each order to find these; some wait for a snapshot and are no candidates


class _Candidate(NamedTuple):
    sequence: Sequence
    match: Match  # its cached prefix
    passed: Sequence | None  # the first of the queue, if the candidate passes over it


class Admission:
    """Gives waiting sequences a slot, blocks and their cached prefix.

    running: the scheduler's own list, not a copy. start: called with each admitted sequence; it must add the sequence
    to `running`.
    """

    def __init__(
        self,
        waiting: WaitingQueue,
        running: list[Sequence],
        slots: SlotManager,
        reuse: Reuse,
        siblings: Siblings,
        order: PromptOrder,
        start: Callable[[Sequence], None],
    ) -> None:
        self._waiting = waiting
        self._running = running
        self._slots = slots
        self._reuse = reuse
        self._cache, self._blocks = reuse.cache, reuse.blocks
        self._siblings = siblings
        self._order = order
        self._start = start
        self._matches: dict[Sequence, Match] = {}  # of waiting sequences; valid while the cache counts `_num_given`
        self._num_given = 0
        self._found: dict[Sequence, Match | None] = {}  # the answers of `_find` in this step
        self._saving: list[Sequence] = []  # running prompts that will save snapshots, as of this step

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence."""
        self._matches.pop(sequence, None)

    def start_siblings(self) -> set[Sequence]:
        """Start the siblings of every leader that has reached its prompt's last token, as far as there is room. A
        sibling without room computes the prompt itself. Returns the leaders that still wait for siblings."""
        done, held = self._siblings.arrived()
        for leader in done:
            num_own = self._siblings.num_own_blocks(leader)
            for sibling in self._siblings.members(leader):
                if sibling.is_ready and self._slots.num_free and self._cache.make_room(num_own):
                    self._waiting.remove(sibling)
                    self._slots.take(sibling)
                    self._siblings.take_over(sibling, leader)
                    self._start(sibling)
            self._siblings.disband(leader)
        return held

    def admit(self, prompts: list[Sequence], budget: int) -> None:
        """Start the waiting sequences that get a share of the budget beside `prompts`. Adds them to `prompts`."""
        self._found.clear()
        self._saving = sorted(self._reuse.stops, key=lambda s: s.order)
        if not (self._waiting and budget > 0 and self._slots.num_free):
            return
        shares: list[tuple[tuple[int, int, int], int]] = []
        promised = sum(self._blocks.missing(s, s.num_tokens) for s in self._running)  # blocks, to running prompts
        blocked: Sequence | None = None  # the first of the queue, once it has found too few blocks
        while self._slots.num_free:
            candidate = self._next(blocked)
            if candidate is None:
                return
            if not shares:  # only after `_next`, which may add a stop to a running prompt
                shares = [(self._order.rank(s), self._order.next_chunk(s, budget)) for s in prompts]
            sequence, is_first = candidate.sequence, candidate.passed is None and blocked is None
            rank = self._order.rank(sequence, candidate.match.num_cached)
            if (
                not (is_first and self._waiting.is_overdue(sequence))
                and sum(n for other, n in shares if other < rank) >= budget
            ):
                return
            if blocked is not None and not self._leaves_room(sequence, blocked):
                return
            if self._take(candidate, promised):
                promised += self._blocks.missing(sequence, sequence.num_tokens)
                prompts.append(sequence)
                shares.append((self._order.rank(sequence), self._order.next_chunk(sequence, budget)))
            elif is_first and not self._waiting.was_preempted(sequence):
                blocked = sequence
            else:
                return

    def _take(self, candidate: _Candidate, promised: int) -> bool:
        """Start the sequence. Returns False, and changes nothing, if too few blocks are free.

        All of its tokens need room beside the blocks `promised` to running prompts. Room for one chunk would let a long
        prompt be computed half-way and then preempted. While nothing runs, waiting frees no blocks. The sequence then
        starts without its cached prefix, whose blocks may be the ones in its way.
        """
        sequence, match, passed = candidate
        self._slots.take(sequence)
        has_room = self._reuse.resume(sequence, match, promised)
        if not has_room and (self._running or not self._reuse.resume(sequence, NOTHING)):
            self._slots.release(sequence)
            return False
        self._waiting.remove(sequence)
        if passed is not None:
            self._waiting.pass_over(passed)
        self._reuse.plan(sequence, match, itertools.islice(self._waiting.ready(), NUM_COMPARED))
        self._start(sequence)
        self._saving.append(sequence)
        del self._found[sequence]
        self._matches.pop(sequence, None)
        for other, found in self._found.items():
            if found is not None and self._waits(other, found, [sequence]):
                self._found[other] = None
        return True

    def _next(self, blocked: Sequence | None) -> _Candidate | None:
        """The waiting sequence to admit next. If one is `blocked`, another one of the same priority."""
        first = blocked
        candidates: dict[Sequence, Match] = {}
        for queue in (self._waiting.ready(), self._waiting.ready_by_length()):
            num_found = 0
            for sequence in itertools.islice(queue, NUM_EXAMINED):
                # A sequence of higher priority than the first waits for a snapshot, otherwise it would be the first.
                if num_found == NUM_COMPARED or (first is not None and sequence.priority > first.priority):
                    break
                match = None if sequence is blocked else self._find(sequence)
                if match is not None:
                    candidates[sequence] = match
                    num_found += 1
                    first = first or sequence
        if not candidates:
            return None
        assert first is not None
        best = min(candidates, key=lambda s: self._order.rank(s, candidates[s].num_cached))
        if blocked is not None or best is first:
            return _Candidate(best, candidates[best], None)
        if self._waiting.is_overdue(first):
            return _Candidate(first, candidates[first], None)
        return _Candidate(best, candidates[best], first)

    def _find(self, sequence: Sequence) -> Match | None:
        """The cached prefix of a waiting sequence. None if it waits for a running prompt to save a longer one."""
        match = self._found.get(sequence, NOTHING)
        if sequence in self._found and (match is None or self._is_there(match)):
            return match
        awaited = self._reuse.awaited(sequence)
        if awaited is not None:
            self._order.note_awaited(awaited)
            self._found[sequence] = None
        else:
            match = self._match(sequence)
            self._found[sequence] = None if self._waits(sequence, match, self._saving) else match
        return self._found[sequence]

    def _match(self, sequence: Sequence) -> Match:
        """The cached prefix of a waiting sequence. Every step asks for it while the sequence waits for blocks, so the
        tree is walked again only if the answer may have changed."""
        if self._num_given != self._cache.num_given:
            self._matches.clear()
            self._num_given = self._cache.num_given
        match = self._matches.get(sequence)
        if match is None or not self._is_there(match):
            match = self._matches[sequence] = self._reuse.find(sequence)
        return match

    def _is_there(self, match: Match) -> bool:
        return match.node is None or self._cache.has_snapshot(match.node)

    def _waits(self, sequence: Sequence, match: Match, running: list[Sequence]) -> bool:
        """Whether the sequence waits for a snapshot that one of `running` will save. A prompt of lower priority may
        take long to get there, so it is not waited for."""
        others = (s for s in running if s.priority <= sequence.priority)
        awaited = self._reuse.wait_for(sequence, match, others)
        if awaited is None:
            return False
        self._order.note_awaited(awaited)
        return True

    def _leaves_room(self, sequence: Sequence, blocked: Sequence) -> bool:
        """Whether `blocked` would find enough blocks beside `sequence` and all running sequences later than `blocked`.
        Then `blocked` starts at the latest when the earlier running sequences have ended."""
        after = [s for s in self._running if s.order > blocked.order]
        needed = [self._blocks.blocks_for(s.num_tokens) for s in (sequence, blocked, *after)]
        return sum(needed) <= self._blocks.num_blocks
