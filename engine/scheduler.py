"""The whole scheduling policy, without tensors.

Each step, within `max_num_batched_tokens`:
1. every running sequence that is one token behind gets it (decoding never waits for a prompt);
2. prompts get what is left. Beside decoding rows that is at most `mixed_prefill_tokens`, which bounds how long a token
   takes, and twice as many beside `MANY_ROWS`: a step of so many takes as much longer itself.

Prompts, those under way and those that wait, are computed by priority, then by the tokens that they still need, the
fewest first. So a short prompt has its first token after a few steps, however long the others are. In one of
`IN_ORDER_EVERY` such steps they are computed by priority and arrival. So the earliest advances at that rate at least,
however many short ones come.

A waiting prompt is admitted when it has its turn and there are a state slot and KV blocks for all of its tokens.
- One whose beginning is just being computed waits for the checkpoint there, and that prompt needs as many tokens as it
  is away from the checkpoint.
- The first is passed over by `MAX_PASSED` later ones at most, and then admitted before its turn. While there are too
  few blocks for it, later ones are admitted only as far as they would leave it enough.

Sequences with the same prompt (`n`) wait for the first of them: it stops before the prompt's last token, they copy its
state, share its blocks, and all go on from there.

When blocks run out, what is only cached is forgotten; then the last by priority and arrival is preempted: it gives back
everything, is computed again from its tokens later, and is not passed over.
"""

from __future__ import annotations

import bisect
import itertools
import math

from .block_manager import BlockManager
from .errors import ContextLengthError, QueueFullError
from .prefix_cache import Match, PrefixCache
from .reuse import NOTHING, Reuse
from .scheduled_batch import ScheduledBatch
from .sequence import UNSEEN, Sequence, Status
from .siblings import Siblings
from .slots import SlotManager
from .speculation import Speculation
from .steady import Steady
from .waiting import WaitingQueue, is_kept_waiting, is_overdue

NUM_COMPARED = 8  # waiting sequences, the first ones and the shortest, that are compared by what is left to compute
NUM_EXAMINED = 32  # of those that wait, to find as many that need not wait for another's checkpoint
IN_ORDER_EVERY = 4  # steps with prompts
MANY_ROWS = 128


class Scheduler:
    """Owns the queues and, through them, every block and slot that is not free."""

    def __init__(
        self,
        blocks: BlockManager,
        slots: SlotManager,
        *,
        max_num_batched_tokens: int,
        max_waiting: int,
        mixed_prefill_tokens: int | None = None,
        ring_size: int = 0,
        cache: PrefixCache | None = None,
        checkpoint_interval: int = 1 << 20,
        speculation: Speculation | None = None,
        ring_capacity: int = 0,
    ) -> None:
        self.blocks = blocks
        self.cache = PrefixCache(blocks, 0) if cache is None else cache
        self.reuse = Reuse(self.cache, checkpoint_interval)
        self.slots = slots
        self.max_num_batched_tokens = max_num_batched_tokens
        self.mixed_prefill_tokens = max_num_batched_tokens if mixed_prefill_tokens is None else mixed_prefill_tokens
        self.max_waiting = max_waiting
        self.ring_size = ring_size  # decoded tokens after which a slot's state holds them all; 0 = after each
        self.ring_capacity = ring_capacity  # tokens that may wait in a ring
        self.speculation = speculation or Speculation()
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # kept in order
        self.started: list[Sequence] = []  # by the last call of `schedule`
        self.num_preemptions = 0
        self.num_finished = 0  # aborted ones too
        self._by_id: dict[str, Sequence] = {}
        self._at_stop: list[Sequence] = []  # the last step has brought them to a stop
        self._awaited: set[Sequence] = set()  # in this step, prompts whose next checkpoint others wait for
        self._num_prompt_steps = 0
        self._siblings = Siblings(blocks)
        self._steady = Steady(blocks, self.cache.make_room)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def find_leader(self, request_id: str) -> Sequence | None:
        """The sequence whose computed tokens a sibling may still come to copy, or None."""
        sequence = self._by_id.get(request_id)
        return sequence if sequence is not None and sequence in self._siblings else None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `QueueFullError`, or `ContextLengthError` when it could never fit the cache."""
        if len(self.waiting) >= self.max_waiting + self.slots.num_free:  # who finds a slot at once does not queue
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting already (max_waiting = {self.max_waiting}); try again later"
            )
        capacity = self.blocks.num_blocks * self.blocks.block_size
        # The last sampled token is never fed back, so it needs no room.
        needed = sequence.num_prompt_tokens + max(sequence.max_tokens - 1, 0)
        if needed > capacity:
            raise ContextLengthError(
                f"prompt ({sequence.num_prompt_tokens} tokens) and max_tokens ({sequence.max_tokens}) need "
                f"{needed} tokens of KV cache, which holds {capacity}; shorten the request",
                "max_tokens",
            )
        assert sequence.request_id not in self._by_id, f"{sequence.request_id} is in the engine already"
        self._by_id[sequence.request_id] = sequence
        self.waiting.add(sequence)
        self._siblings.add(sequence)
        if sequence.leader is not None:  # without a deadline once it has started
            sequence.deadline = max(sequence.deadline, sequence.leader.deadline)

    def abort(self, request_id: str) -> bool:
        """Forget a sequence and free what it holds, but for what a session is to keep: its answer may be as long as its
        client wants it. False when it is not here (it may just have finished)."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        if sequence.session_id is not None and sequence.output_token_ids:
            self.complete(sequence)
        else:
            self.finish(sequence)
        return True

    def expire(self, now: float) -> list[Sequence]:
        """Forget those that have waited for their start beyond their deadlines, and return them. A preempted one has
        been started, and so has a sibling of one that was; none is forgotten while another prompt is being computed
        that is to spare it its own."""
        late = [s for s in self.waiting if s.deadline < now and not is_kept_waiting(s)]
        for sequence in late:
            self.finish(sequence)
        return late

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, from wherever it is."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
            self._steady.leave(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self.num_finished += 1
        del self._by_id[sequence.request_id]
        self._siblings.remove(sequence)

    def complete(self, sequence: Sequence) -> None:
        """Take a sequence out that has its whole answer, which stays in the prefix cache."""
        self.reuse.save_answer(sequence)
        self.finish(sequence)

    def schedule(self) -> ScheduledBatch:
        """Choose the next step's rows and give them the blocks and slots they need."""
        self.started = []
        nobody_joins = not self.waiting or not self.slots.num_free
        if nobody_joins and not self.speculation.applies_to(len(self.running)):
            advance = self._steady.advance()
            if advance is not None:
                return ScheduledBatch(advance.rows, [1] * len(advance.rows), 0, self.reuse.take_copies(), advance)
        batch = self._schedule_anew()
        self._steady.follow(batch.sequences, batch.num_prefills, self.running)
        return batch

    def _schedule_anew(self) -> ScheduledBatch:
        """Ask every sequence."""
        for sequence in self._at_stop:
            if sequence.status is Status.RUNNING:
                self.reuse.save_at_stop(sequence)
        self._at_stop = []
        held = self._start_siblings()
        budget = self.max_num_batched_tokens
        decoding: dict[Sequence, int] = {}
        behind: list[Sequence] = []
        block_size = self.blocks.block_size
        for sequence in self.running.copy():
            num_new, num_computed = sequence.num_uncomputed_tokens, sequence.num_computed_tokens
            if (
                sequence.is_verifying
                or (held and sequence in held)
                or (sequence.grammar is not None and sequence.waits_for_its_token)
            ):
                continue
            if num_new > 1 or num_computed == 0:
                behind.append(sequence)
            elif num_new and budget:
                has_room = num_computed < len(sequence.block_table) * block_size  # nearly always
                if has_room or self._make_room(sequence, 1, decoding):
                    decoding[sequence] = 1
                    budget -= 1
        if decoding:
            budget = min(budget, self.mixed_prefill_tokens * (2 if len(decoding) >= MANY_ROWS else 1))
        prefilling = self._bring_prompts(behind, decoding, budget)
        if not prefilling and self.speculation.applies_to(len(decoding)):
            drafted = self._draft(list(decoding))
            if drafted is not None:
                return drafted
        if not self.ring_size:
            for sequence in decoding:
                self.reuse.fold(sequence)  # which only those with drafts left in a ring
        rows = [*prefilling, *decoding]
        snapshots = self.reuse.leave_rungs(prefilling)
        copies = self.reuse.take_copies() if rows else []  # what is to be saved stays where it is until the next step
        counts = [*prefilling.values(), *decoding.values()]
        return ScheduledBatch(rows, counts, len(prefilling), copies, snapshots=snapshots)

    def _draft(self, rows: list[Sequence]) -> ScheduledBatch | None:
        """A step of these decoding rows with drafts, an empty one where these depend on tokens that are on their way,
        or None when nobody has drafts."""
        budget = self.max_num_batched_tokens - len(rows)
        if not budget:
            return None
        if self.speculation.waits(rows):
            return ScheduledBatch([], [], 0)
        if any(row.ends_in_unseen for row in rows):
            return None
        for row in rows:
            row.drafts = self._fitting(row, self.speculation.drafts(row)[:budget])
            budget -= len(row.drafts)
        if not any(row.drafts for row in rows):
            return None
        for row in rows:  # a place stays free, for a step without drafts
            if row.num_pending_tokens + 1 + len(row.drafts) >= self.ring_capacity:
                self.reuse.fold(row)
        counts = [1 + len(row.drafts) for row in rows]
        return ScheduledBatch(rows, counts, len(rows), self.reuse.take_copies(), num_drafted=len(rows))

    def _fitting(self, sequence: Sequence, drafts: list[int]) -> list[int]:
        """As many of the drafts as there are blocks for without putting anybody out."""
        total = sequence.num_computed_tokens + 1 + len(drafts)
        if self.cache.make_room(self.blocks.missing(sequence, total)):
            self.blocks.grow(sequence, total)
        return drafts[: len(sequence.block_table) * self.blocks.block_size - sequence.num_computed_tokens - 1]

    def update(self, batch: ScheduledBatch) -> None:
        """Note that the batch is being computed: what it completes ends in `UNSEEN` until its tokens arrive. Of drafts
        nothing is known before."""
        if batch.num_drafted:
            for sequence in batch.sequences:
                sequence.is_verifying = True
            return
        num_prefills, last_in_ring = batch.num_prefills, self.ring_size - 1
        for row in batch.completing_prefills:
            if batch.sequences[row].max_tokens > 0:
                batch.sequences[row].output_token_ids.append(UNSEEN)
        for sequence, num_new in zip(batch.sequences[:num_prefills], batch.num_scheduled_tokens, strict=False):
            sequence.num_computed_tokens += num_new
            sequence.num_pending_tokens = 0
            if sequence.stops and sequence.num_computed_tokens >= sequence.stops[0]:
                self._at_stop.append(sequence)
        for sequence in batch.sequences[num_prefills:]:  # many, and each completes
            sequence.output_token_ids.append(UNSEEN)
            sequence.num_computed_tokens += 1
            pending = sequence.num_pending_tokens
            sequence.num_pending_tokens = pending + 1 if pending < last_in_ring else 0

    def verified(self, sequence: Sequence) -> None:
        """Note that a step with the sequence's drafts has come back."""
        sequence.is_verifying, sequence.drafts = False, []

    def keep_verified(self, sequence: Sequence) -> None:
        """One more token of such a step is the sequence's. One that has fallen since has given it back."""
        sequence.output_token_ids.append(UNSEEN)
        if sequence.status is Status.RUNNING:
            sequence.num_computed_tokens += 1
            sequence.num_pending_tokens += 1

    def check_integrity(self) -> None:
        """Ownership is whole and the queues are in order. Raises AssertionError."""
        self.blocks.check_integrity(self.running, self.cache.tables())
        self.cache.check_integrity()
        self.slots.check_integrity(self.running)
        self.waiting.check_integrity()
        assert self.running == sorted(self.running, key=lambda s: s.order)
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert 0 <= sequence.num_pending_tokens < max(self.ring_capacity, self.ring_size, 1)
        assert len(self._by_id) == len(self.waiting) + len(self.running)

    def _bring_prompts(self, behind: list[Sequence], decoding: dict[Sequence, int], budget: int) -> dict[Sequence, int]:
        """Share the budget among prompts, those under way and new ones. Returns the tokens that each gets; one of which
        all but the last token was cached joins `decoding`."""
        prompts = [sequence for sequence in behind if sequence.status is Status.RUNNING]
        self._awaited.clear()
        self._admit(prompts, budget)
        prefilling: dict[Sequence, int] = {}
        for sequence in sorted(prompts, key=self._rank):
            num_new = self._next_chunk(sequence, budget)
            if num_new and self._make_room(sequence, num_new, decoding, prefilling):
                scheduled = decoding if sequence.is_decoding else prefilling
                scheduled[sequence] = num_new
                budget -= num_new
        self._num_prompt_steps += bool(prefilling)
        return prefilling

    def _rank(self, sequence: Sequence, num_cached: int = 0) -> tuple[int, int, int]:
        """The lowest is computed first. num_cached: tokens that a waiting sequence would find in the cache."""
        num_left = sequence.num_uncomputed_tokens - num_cached
        if sequence in self._awaited and sequence.stops:
            num_left = sequence.stops[0] - sequence.num_computed_tokens
        is_in_order = self._num_prompt_steps % IN_ORDER_EVERY == IN_ORDER_EVERY - 1
        return (sequence.priority, 0 if is_in_order else num_left, sequence.arrival)

    def _next_chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens to compute of a prompt: up to its next checkpoint. One that others wait for stops before its last."""
        num_new = sequence.num_uncomputed_tokens
        if sequence in self._siblings:
            num_new -= 1
        if sequence.stops:
            num_new = min(num_new, sequence.stops[0] - sequence.num_computed_tokens)
        return min(num_new, budget)

    def _start_siblings(self) -> set[Sequence]:
        """Start the siblings of those that have reached their prompt's last token, as far as there is room: one that
        finds none computes for itself. Returns those that wait for siblings to arrive."""
        done, held = self._siblings.arrived()
        for leader in done:
            num_own = self._siblings.num_own_blocks(leader)
            for sibling in leader.siblings:
                if sibling.is_ready and self.slots.num_free and self.cache.make_room(num_own):
                    self.waiting.remove(sibling)
                    self.slots.take(sibling)
                    self.reuse.copies.append(self._siblings.take_over(sibling, leader))
                    self._start(sibling)
            self._siblings.disband(leader)
        return held

    def _start(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        for started in (sequence, *sequence.siblings):
            started.deadline = math.inf
        self.started.append(sequence)
        bisect.insort(self.running, sequence, key=lambda s: s.order)

    def _admit(self, prompts: list[Sequence], budget: int) -> None:
        """Start those of the waiting sequences that would get a share of the budget beside `prompts`, and add them
        there."""
        if not (self.waiting and budget > 0 and self.slots.num_free):
            return
        promised = sum(self.blocks.missing(s, s.num_tokens) for s in self.running)  # to prompts under way
        shares = [(self._rank(s), self._next_chunk(s, budget)) for s in prompts]
        blocked: Sequence | None = None  # the first, for which there are too few blocks
        seen: dict[Sequence, Match | None] = {}
        while self.slots.num_free:
            found = self._next_to_admit(blocked, seen)
            if found is None:
                return
            sequence, match, passed = found
            rank, is_first = self._rank(sequence, match.num_cached), passed is None and blocked is None
            if not (is_first and is_overdue(sequence)) and sum(n for other, n in shares if other < rank) >= budget:
                return
            if blocked is not None and not self._leaves_room(sequence, blocked):
                return
            self.slots.take(sequence)
            # Room for the whole sequence as it is, not for one chunk, beside what others have begun: else a long prompt
            # would be fed half-way and put out again. When nobody runs no room will come of waiting: then the blocks
            # that it could begin with are in its way.
            if not self.reuse.resume(sequence, match, promised) and (
                self.running or not self.reuse.resume(sequence, NOTHING)
            ):
                self.slots.release(sequence)
                if not is_first or sequence.was_preempted:
                    return
                blocked = sequence
                continue
            self.waiting.remove(sequence)
            if passed is not None:
                passed.num_passed += 1
            self.reuse.plan(sequence, match, itertools.islice(self.waiting.ready(), NUM_COMPARED))
            self._start(sequence)
            del seen[sequence]
            for other, known in seen.items():
                if known is not None and self._waits(other, known, [sequence]):
                    seen[other] = None
            promised += self.blocks.missing(sequence, sequence.num_tokens)
            prompts.append(sequence)
            shares.append((self._rank(sequence), self._next_chunk(sequence, budget)))

    def _next_to_admit(
        self, blocked: Sequence | None, seen: dict[Sequence, Match | None]
    ) -> tuple[Sequence, Match, Sequence | None] | None:
        """The waiting sequence that goes next, what is cached of it, and the first one where that is passed over for
        it. With one `blocked`, of the others of its priority. `seen`: what `_find` has said in this step."""
        first = blocked
        candidates: dict[Sequence, Match] = {}
        for queue in (self.waiting.ready(), self.waiting.ready_by_length()):
            num_found = 0
            for sequence in itertools.islice(queue, NUM_EXAMINED):
                if num_found == NUM_COMPARED or (first is not None and sequence.priority != first.priority):
                    break
                match = None if sequence is blocked else self._find(sequence, seen)
                if match is not None:
                    candidates[sequence] = match
                    num_found += 1
                    first = first or sequence
        if not candidates:
            return None
        assert first is not None
        best = min(candidates, key=lambda s: self._rank(s, candidates[s].num_cached))
        if blocked is not None or best is first:
            return best, candidates[best], None
        if is_overdue(first):
            return first, candidates[first], None
        return best, candidates[best], first

    def _find(self, sequence: Sequence, seen: dict[Sequence, Match | None]) -> Match | None:
        """What is cached of a waiting sequence, or None where it waits for a prompt that is about to leave more."""
        match = seen.get(sequence, NOTHING)
        if sequence in seen and (match is None or match.node is None or self.cache.has_checkpoint(match.node)):
            return match
        if is_kept_waiting(sequence) and sequence.waits_for is not None:
            self._awaited.add(sequence.waits_for)
            seen[sequence] = None
        else:
            match = self.reuse.find(sequence)
            seen[sequence] = None if self._waits(sequence, match, self.running) else match
        return seen[sequence]

    def _waits(self, sequence: Sequence, match: Match, running: list[Sequence]) -> bool:
        """Whether one of `running` is about to leave a checkpoint for it. It waits for none of lower priority, which
        may be long in coming."""
        if not self.reuse.waits(sequence, match, (s for s in running if s.priority <= sequence.priority)):
            return False
        assert sequence.waits_for is not None
        self._awaited.add(sequence.waits_for)
        return True

    def _leaves_room(self, sequence: Sequence, blocked: Sequence) -> bool:
        """Whether all that come after `blocked`, with this one, leave the blocks that it needs: it then starts at the
        latest when all before it have ended."""
        after = [s for s in self.running if s.order > blocked.order]
        needed = [self.blocks.blocks_for(s.num_tokens) for s in (sequence, blocked, *after)]
        return sum(needed) <= self.blocks.num_blocks

    def _make_room(self, sequence: Sequence, num_new: int, *scheduled: dict[Sequence, int]) -> bool:
        """Give `sequence` the blocks for num_new more tokens, preempting from the end. False if it fell itself."""
        total = sequence.num_computed_tokens + num_new
        if sequence.status is not Status.RUNNING:  # preempted for one before it
            return False
        while not self.cache.make_room(self.blocks.missing(sequence, total)):
            victim = self.running[-1]
            self._preempt(victim)
            for rows in scheduled:
                rows.pop(victim, None)
            if victim is sequence:
                return False
        self.blocks.grow(sequence, total)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed_tokens = sequence.num_pending_tokens = 0
        sequence.stops = []
        sequence.status = Status.WAITING
        sequence.was_preempted = True
        self.waiting.add(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        self.slots.release(sequence)
        sequence.is_counted = False
