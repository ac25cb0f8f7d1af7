"""Which waiting sequences start.

A waiting prompt is admitted when it has its turn and there are a state slot and KV blocks for all of its tokens.
- A prompt whose beginning is being computed waits for the snapshot there, unless the other has lower priority.
- The first of the queue is passed over by `MAX_PASSED` later ones at most, and is then admitted before its turn.
- While there are too few blocks for the first, later ones of its priority are admitted only as far as they leave it
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

NUM_COMPARED = 8  # waiting sequences, the first ones and the shortest, that are compared by what is left to compute
NUM_EXAMINED = 32  # of those that wait, to find as many that need not wait for another's snapshot


class _Candidate(NamedTuple):
    sequence: Sequence
    match: Match  # what is cached of it
    passed: Sequence | None  # the first of the queue, where that is passed over


class Admission:
    """Gives waiting sequences their slot, their blocks and what is cached of them.

    running: the scheduler's list, which changes. start: called with each sequence that is admitted; it puts the
    sequence into `running`.
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
        self._matches: dict[Sequence, Match] = {}  # what is cached of some that wait, as of `_num_given`
        self._num_given = 0
        self._found: dict[Sequence, Match | None] = {}  # in this step, by `_find`
        self._saving: list[Sequence] = []  # in this step, running prompts that will leave snapshots

    def forget(self, sequence: Sequence) -> None:
        """The sequence is gone."""
        self._matches.pop(sequence, None)

    def start_siblings(self) -> set[Sequence]:
        """Start the siblings of those that have reached their prompt's last token, as far as there is room: one that
        finds none computes for itself. Returns those that wait for siblings to arrive."""
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
        """Start the waiting sequences that get a share of the budget beside `prompts`, and add them to `prompts`."""
        self._found.clear()
        self._saving = sorted(self._reuse.stops, key=lambda s: s.order)
        if not (self._waiting and budget > 0 and self._slots.num_free):
            return
        shares: list[tuple[tuple[int, int, int], int]] = []
        promised = sum(self._blocks.missing(s, s.num_tokens) for s in self._running)  # to prompts under way
        blocked: Sequence | None = None  # the first of the queue, where there are too few blocks for it
        while self._slots.num_free:
            candidate = self._next(blocked)
            if candidate is None:
                return
            if not shares:  # not before `_next`, by which a prompt under way may stop sooner
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
        """Start the sequence. False, and nothing has changed, where there are too few blocks.

        It gets room for all of its tokens, not for one chunk, beside the blocks `promised` to prompts under way: else a
        long prompt would be fed half-way and preempted. While nothing runs, no room will come of waiting: then the
        blocks of what is cached of the sequence are in its way.
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
        """The waiting sequence that goes next. With one `blocked`, one of the others of its priority."""
        first = blocked
        candidates: dict[Sequence, Match] = {}
        for queue in (self._waiting.ready(), self._waiting.ready_by_length()):
            num_found = 0
            for sequence in itertools.islice(queue, NUM_EXAMINED):
                # One of higher priority than the first waits for a snapshot: else it would be the first.
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
        """What is cached of a waiting sequence, or None where it waits for a prompt that is about to leave more."""
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
        """What is cached of a waiting sequence. It is looked up again only where that may have changed: those that wait
        for blocks are asked in every step."""
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
        """Whether one of `running` is about to leave a snapshot for the sequence. It waits for none of lower
        priority, which may be long in coming."""
        others = (s for s in running if s.priority <= sequence.priority)
        awaited = self._reuse.wait_for(sequence, match, others)
        if awaited is None:
            return False
        self._order.note_awaited(awaited)
        return True

    def _leaves_room(self, sequence: Sequence, blocked: Sequence) -> bool:
        """Whether all that come after `blocked`, with this one, leave the blocks that it needs: it then starts at the
        latest when all before it have ended."""
        after = [s for s in self._running if s.order > blocked.order]
        needed = [self._blocks.blocks_for(s.num_tokens) for s in (sequence, blocked, *after)]
        return sum(needed) <= self._blocks.num_blocks
