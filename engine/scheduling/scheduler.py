"""The whole scheduling policy, without tensors.

A step has a budget of `max_num_batched_tokens`:
1. Every running sequence that is one token behind gets a decode row. Decoding never waits for a prompt.
2. Running and waiting prompts share the rest of the budget, in the order of `prompt_order.py`. `admission.py` starts
   the waiting ones. Beside decode rows they get at most `mixed_prefill_tokens`, which bounds the time between two
   tokens of an answer. Beside `MANY_ROWS` decode rows they get twice as many, because such a step is slow anyway.

`siblings.py` lets sequences with the same prompt (`n`) share its computation. When blocks run out, the prefix cache
gives up some, and then `preemption.py` preempts running sequences.
"""

from __future__ import annotations

import bisect
import math

from ..errors import ContextLengthError, QueueFullError
from ..memory.operations import OperationQueue
from ..memory.ring import RingRule
from ..memory.slots import SlotManager
from ..prefix.cache import PrefixCache
from ..prefix.reuse import Reuse
from ..sequence import UNSEEN, Sequence, Status
from .admission import Admission
from .continuation import Continuation
from .preemption import Preemption
from .prompt_order import PromptOrder
from .siblings import Siblings
from .speculation import Speculation
from .step import ScheduledBatch
from .verify_steps import VerifySteps
from .waiting import WaitingQueue

MANY_ROWS = 128


class Scheduler:
    """Owns the queues and, through them, every block and slot that is not free."""

    def __init__(
        self,
        cache: PrefixCache,
        slots: SlotManager,
        *,
        max_num_batched_tokens: int,
        max_waiting: int,
        mixed_prefill_tokens: int,
        ring: RingRule,
        snapshot_interval: int,
        snapshot_every: int,
        speculation: Speculation,
    ) -> None:
        self.cache = cache
        self.blocks = cache.blocks
        self.operations = OperationQueue()
        self.reuse = Reuse(self.cache, self.operations, snapshot_interval, snapshot_every)
        self.slots = slots
        self.max_num_batched_tokens = max_num_batched_tokens
        self.mixed_prefill_tokens = mixed_prefill_tokens
        self.max_waiting = max_waiting
        self.ring = ring
        self.speculation = speculation
        self.waiting = WaitingQueue(self._may_start)
        self.running: list[Sequence] = []  # by priority and arrival
        self.num_finished = 0  # including aborted sequences
        self._by_id: dict[str, Sequence] = {}
        self._started: list[Sequence] = []  # sequences that have started since the last step was built
        self._at_stop: list[Sequence] = []  # sequences that the last step brought to a stop
        self.preemption = Preemption(self.running, self.waiting, slots, self.reuse)
        self._siblings = Siblings(self.blocks, self.operations)
        self._order = PromptOrder(self._siblings, self.reuse)
        self._admission = Admission(
            self.waiting, self.running, slots, self.reuse, self._siblings, self._order, self._start
        )
        self._verify_steps = VerifySteps(speculation, ring, self.reuse, self.operations, max_num_batched_tokens)
        self._continuation = Continuation(self.blocks, self.cache.make_room)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_preemptions(self) -> int:
        return self.preemption.num_preemptions

    def add(self, sequence: Sequence, deadline: float = math.inf) -> None:
        """Queue a sequence. `expire` refuses it if it has not started by `deadline` on the monotonic clock. Raises
        `QueueFullError`, or `ContextLengthError` if the sequence needs more blocks than exist."""
        if len(self.waiting) >= self.max_waiting + self.slots.num_free:  # a sequence with a free slot does not wait
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting already (max_waiting = {self.max_waiting}); try again later"
            )
        capacity = self.blocks.num_blocks * self.blocks.block_size
        # The last sampled token is never fed, so it needs no room.
        needed = sequence.num_prompt_tokens + max(sequence.max_tokens - 1, 0)
        if needed > capacity:
            raise ContextLengthError(
                f"prompt ({sequence.num_prompt_tokens} tokens) and max_tokens ({sequence.max_tokens}) need "
                f"{needed} tokens of KV cache, which holds {capacity}; shorten the request",
                "max_tokens",
            )
        assert sequence.request_id not in self._by_id, f"{sequence.request_id} is in the engine already"
        self._by_id[sequence.request_id] = sequence
        self._siblings.add(sequence, self._by_id.get(sequence.request.sibling_of or ""))
        self.reuse.add(sequence)
        leader = self._siblings.leader(sequence)
        if leader is not None:  # the deadline of a started leader is infinite
            deadline = max(deadline, self.waiting.deadline(leader))
        self.waiting.add(sequence, deadline)

    def abort(self, request_id: str) -> Sequence | None:
        """Remove a sequence and free its slot and blocks. The answer of a session stays in the prefix cache, because
        the client may have ended it on purpose. Returns the sequence; None if the id is unknown, as it is when the
        sequence has just finished."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return None
        if sequence.request.session_id is not None and sequence.output_token_ids:
            self.complete(sequence)
        else:
            self.finish(sequence)
        return sequence

    def expire(self, now: float) -> list[Sequence]:
        """Remove the sequences whose deadline has passed before they started, and return them. Preempted sequences and
        siblings of a started leader have no deadline. A sequence stays while a running prompt computes a snapshot for
        it."""
        late = [sequence for sequence in self.waiting.late(now) if self.reuse.awaited(sequence) is None]
        for sequence in late:
            self.finish(sequence)
        return late

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence, running or waiting, from the queues and from every policy."""
        if sequence.status is Status.RUNNING:
            self.preemption.release(sequence)
            self._continuation.leave(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self.num_finished += 1
        del self._by_id[sequence.request_id]
        self._siblings.remove(sequence)
        self._admission.forget(sequence)
        self.reuse.forget(sequence)
        self.speculation.forget(sequence)

    def complete(self, sequence: Sequence) -> None:
        """Remove a sequence whose answer is complete. The answer stays in the prefix cache."""
        self.reuse.save_answer(sequence)
        self.finish(sequence)

    def schedule(self) -> ScheduledBatch:
        """Build the next step: choose its rows and give them slots and blocks."""
        none_joins = not self.waiting or not self.slots.num_free
        if none_joins and not self.speculation.applies_to(len(self.running)):
            advance = self._continuation.advance()
            if advance is not None:
                counts, operations = [1] * len(advance.rows), self.operations.take()
                return ScheduledBatch(advance.rows, counts, 0, operations, advance, num_finished=self.num_finished)
        batch = self._schedule_anew()
        self._continuation.follow(batch.sequences, batch.num_prefills, self.running)
        batch.num_finished = self.num_finished
        batch.started, self._started = self._started, []
        return batch

    def _schedule_anew(self) -> ScheduledBatch:
        """Build a step by visiting every running sequence (the slow path)."""
        for sequence in self._at_stop:
            if sequence.status is Status.RUNNING:
                self.reuse.save_at_stop(sequence)
        self._at_stop = []
        held = self._admission.start_siblings()
        budget = self.max_num_batched_tokens
        decoding: dict[Sequence, int] = {}
        behind: list[Sequence] = []
        block_size, verifying = self.blocks.block_size, self.speculation.verifying
        for sequence in self.running.copy():
            num_new, num_computed = sequence.num_uncomputed_tokens, sequence.num_computed_tokens
            if (
                (verifying and sequence in verifying)
                or (held and sequence in held)
                or (sequence.grammar is not None and sequence.waits_for_its_token)
            ):
                continue
            if num_new > 1 or num_computed == 0:
                behind.append(sequence)
            elif num_new and budget:
                has_room = num_computed < len(sequence.block_table) * block_size  # nearly always
                if has_room or self.preemption.make_room(sequence, 1, decoding):
                    decoding[sequence] = 1
                    budget -= 1
        if decoding:
            budget = min(budget, self.mixed_prefill_tokens * (2 if len(decoding) >= MANY_ROWS else 1))
        prefilling = self._bring_prompts(behind, decoding, budget)
        if not prefilling and self.speculation.applies_to(len(decoding)):
            drafted = self._verify_steps.schedule(list(decoding))
            if drafted is not None:
                return drafted
        if not self.ring.replays:
            for sequence in decoding:
                self.reuse.fold(sequence)  # only a verify row can have left tokens in the ring
        rows = [*prefilling, *decoding]
        snapshots = self.reuse.leave_rungs(prefilling)
        # A batch without rows is never launched: the operations stay pending, and the slots that they read unchanged.
        operations = self.operations.take() if rows else []
        counts = [*prefilling.values(), *decoding.values()]
        return ScheduledBatch(rows, counts, len(prefilling), operations, snapshots=snapshots)

    def update(self, batch: ScheduledBatch) -> None:
        """Count the batch's tokens as computed once the batch is launched. Each row that gets a next token ends in
        `UNSEEN` until that token arrives. A batch with drafts counts nothing yet: its kept tokens are known later
        (`keep_verified`)."""
        if batch.drafts:
            self.speculation.verifying.update(batch.sequences)
            return
        num_prefills, pending_after = batch.num_prefills, self.ring.after_decode
        for row in batch.completing_prefills:
            if batch.sequences[row].max_tokens > 0:
                batch.sequences[row].output_token_ids.append(UNSEEN)
        for sequence, num_new in zip(batch.sequences[:num_prefills], batch.num_scheduled_tokens, strict=False):
            sequence.num_computed_tokens += num_new
            sequence.num_pending_tokens = 0
            stops = self.reuse.stops.get(sequence)
            if stops and sequence.num_computed_tokens >= stops[0]:
                self._at_stop.append(sequence)
        for sequence in batch.sequences[num_prefills:]:  # often many: a loop of its own without any test
            sequence.output_token_ids.append(UNSEEN)
            sequence.num_computed_tokens += 1
            sequence.num_pending_tokens = pending_after[sequence.num_pending_tokens]

    def verified(self, sequence: Sequence) -> None:
        """Note that the step with the sequence's drafts has returned its tokens."""
        self.speculation.verifying.discard(sequence)

    def keep_verified(self, sequence: Sequence) -> None:
        """Append one more token of a step with drafts to the sequence. A sequence that was preempted meanwhile has no
        computed tokens, so nothing is counted for it."""
        sequence.output_token_ids.append(UNSEEN)
        if sequence.status is Status.RUNNING:
            sequence.num_computed_tokens += 1
            sequence.num_pending_tokens += 1

    def check_integrity(self) -> None:
        """Every block, slot and snapshot has its owners, and the queues are in order. Raises AssertionError."""
        self.blocks.check_integrity(self.running, self.cache.tables())
        self.cache.check_integrity()
        self.slots.check_integrity(self.running)
        self.waiting.check_integrity()
        assert self.running == sorted(self.running, key=lambda s: s.order)
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert 0 <= sequence.num_pending_tokens < max(self.ring.capacity, 1)
        assert len(self._by_id) == len(self.waiting) + len(self.running)
        alive = set(self._by_id.values())
        self._siblings.check_integrity(alive)
        self.reuse.check_integrity(alive, set(self.running))
        self.speculation.check_integrity(alive)

    def _bring_prompts(self, behind: list[Sequence], decoding: dict[Sequence, int], budget: int) -> dict[Sequence, int]:
        """Share the budget among the running prompts `behind` and waiting ones. Returns the number of tokens per
        prompt. Adds to `decoding` each prompt whose tokens were all cached but the last."""
        prompts = [sequence for sequence in behind if sequence.status is Status.RUNNING]
        self._order.begin_step()
        self._admission.admit(prompts, budget)
        prefilling: dict[Sequence, int] = {}
        for sequence in sorted(prompts, key=self._order.rank):
            num_new = self._order.next_chunk(sequence, budget)
            if num_new and self.preemption.make_room(sequence, num_new, decoding, prefilling):
                scheduled = decoding if sequence.is_decoding else prefilling
                scheduled[sequence] = num_new
                budget -= num_new
        self._order.end_step(has_prompts=bool(prefilling))
        return prefilling

    def _start(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        for sibling in self._siblings.members(sequence):
            if sibling.status is Status.WAITING:
                self.waiting.waive_deadline(sibling)
        self._started.append(sequence)
        bisect.insort(self.running, sequence, key=lambda s: s.order)

    def _may_start(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence lacks nothing but room. A preempted sequence may have a step under way, whose
        token it must get first."""
        has_all = not sequence.ends_in_unseen and sequence not in self.speculation.verifying
        return has_all and sequence.is_ready and self._siblings.leader(sequence) is None
