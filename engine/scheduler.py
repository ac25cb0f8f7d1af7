"""The whole scheduling policy, without tensors.

Each step, within `max_num_batched_tokens`:
1. every running sequence that is one token behind gets it (decoding never waits for a prompt);
2. running sequences that are further behind continue their prefill, in order;
3. waiting sequences are admitted in order while a state slot, KV blocks and budget last.
Beside decoding rows, 2 and 3 together bring at most `mixed_prefill_tokens`, which bounds how long a token takes.

Sequences with the same prompt (`n`) wait for the first of them: it stops before the prompt's last token, they copy its
state and blocks, and all go on from there.

Order is priority, then arrival. When blocks run out, the last in order is preempted: it gives back everything, and is
computed again from its tokens later.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from .block_manager import BlockManager
from .errors import ContextLengthError, QueueFullError
from .sequence import UNSEEN, Sequence, Status
from .slots import SlotManager
from .steady import Advance, Steady

SIBLING_PATIENCE = 2000  # steps that a sequence waits for siblings that were announced: they are on their way


class Copy(NamedTuple):
    """What one sequence takes over from another before a step: a state, and the contents of blocks."""

    source_slot: int
    target_slot: int
    source_blocks: list[int]
    target_blocks: list[int]


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The rows of one step: prefill rows first, then decode rows, each with the tokens it brings."""

    sequences: list[Sequence]
    num_scheduled_tokens: list[int]
    num_prefills: int
    copies: list[Copy] = field(default_factory=list)  # to make before anything is computed
    advance: Advance | None = None  # from the batch before, where this one follows from it

    @property
    def is_empty(self) -> bool:
        return not self.sequences

    @property
    def num_decodes(self) -> int:
        return len(self.sequences) - self.num_prefills

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some prompt's tokens are to be scored."""
        prompts = self.sequences[: self.num_prefills]
        return any(s.sampling_params.prompt_logprobs is not None and not s.num_output_tokens for s in prompts)

    @property
    def completing_prefills(self) -> list[int]:
        """Prefill rows whose tokens are all computed after this step. Asked before `update`."""
        counts, rows = self.num_scheduled_tokens, range(self.num_prefills)
        return [row for row in rows if self.sequences[row].num_uncomputed_tokens == counts[row]]

    @property
    def completing_rows(self) -> list[int]:
        """These and the decode rows: each gets its next token."""
        return [*self.completing_prefills, *range(self.num_prefills, len(self.sequences))]


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
    ) -> None:
        self.blocks = blocks
        self.slots = slots
        self.max_num_batched_tokens = max_num_batched_tokens
        self.mixed_prefill_tokens = max_num_batched_tokens if mixed_prefill_tokens is None else mixed_prefill_tokens
        self.max_waiting = max_waiting
        self.ring_size = ring_size  # decoded tokens after which a slot's state holds them all; 0 = after each
        self.waiting: list[Sequence] = []  # kept in order
        self.running: list[Sequence] = []  # kept in order
        self.num_preemptions = 0
        self.num_finished = 0  # aborted ones too
        self._by_id: dict[str, Sequence] = {}
        self._leaders: dict[Sequence, int] = {}  # siblings are still to copy from them; steps they may wait for these
        self._steady = Steady(blocks)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def find_leader(self, request_id: str) -> Sequence | None:
        """The sequence whose computed tokens a sibling may still come to copy, or None."""
        sequence = self._by_id.get(request_id)
        return sequence if sequence in self._leaders else None

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
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)
        if sequence.num_siblings and sequence.num_prompt_tokens > 1:
            self._leaders[sequence] = SIBLING_PATIENCE
        if sequence.leader is not None:
            sequence.leader.siblings.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a sequence and free what it holds. False when it is not here (it may just have finished)."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        self.finish(sequence)
        return True

    def expire(self, now: float) -> list[Sequence]:
        """Forget those that have waited for their start beyond their deadlines, and return them. A preempted one has
        been started, and is not among them."""
        late = [s for s in self.waiting if s.deadline < now]
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
        self._disband(sequence)
        if sequence.leader is not None:
            sequence.leader.siblings.remove(sequence)
            sequence.leader.num_siblings -= 1

    def schedule(self) -> ScheduledBatch:
        """Choose the next step's rows and give them the blocks and slots they need."""
        if not self.waiting or not self.slots.num_free:  # nobody can join those that run
            advance = self._steady.advance()
            if advance is not None:
                return ScheduledBatch(advance.rows, [1] * len(advance.rows), 0, advance=advance)
        batch = self._schedule_anew()
        self._steady.follow(batch.sequences, batch.num_prefills, self.running)
        return batch

    def _schedule_anew(self) -> ScheduledBatch:
        """Ask every sequence."""
        copies, held = self._copy_prompts()
        budget = self.max_num_batched_tokens
        decoding: dict[Sequence, int] = {}
        prefilling: dict[Sequence, int] = {}
        behind = []
        block_size = self.blocks.block_size
        for sequence in self.running.copy():
            num_new, num_computed = sequence.num_uncomputed_tokens, sequence.num_computed_tokens
            if (held and sequence in held) or (sequence.grammar is not None and sequence.waits_for_its_token):
                continue
            if num_new > 1 or num_computed == 0:
                behind.append(sequence)
            elif num_new and budget:
                has_room = num_computed < len(sequence.block_table) * block_size  # nearly always
                if has_room or self._make_room(sequence, 1, decoding):
                    decoding[sequence] = 1
                    budget -= 1
        if decoding:
            budget = min(budget, self.mixed_prefill_tokens)
        for sequence in behind:
            num_new = self._next_chunk(sequence, budget)
            if num_new and self._make_room(sequence, num_new, decoding, prefilling):
                prefilling[sequence] = num_new
                budget -= num_new
        self._admit(prefilling, budget)
        rows = [*prefilling, *decoding]
        assert rows or not copies, "what was copied is used"
        return ScheduledBatch(rows, [*prefilling.values(), *decoding.values()], len(prefilling), copies)

    def update(self, batch: ScheduledBatch) -> None:
        """Note that the batch is being computed: what it completes ends in `UNSEEN` until its tokens arrive."""
        num_prefills, last_in_ring = batch.num_prefills, self.ring_size - 1
        for row in batch.completing_prefills:
            if batch.sequences[row].max_tokens > 0:
                batch.sequences[row].output_token_ids.append(UNSEEN)
        for sequence, num_new in zip(batch.sequences[:num_prefills], batch.num_scheduled_tokens, strict=False):
            sequence.num_computed_tokens += num_new
            sequence.num_pending_tokens = 0
        for sequence in batch.sequences[num_prefills:]:  # many, and each completes
            sequence.output_token_ids.append(UNSEEN)
            sequence.num_computed_tokens += 1
            pending = sequence.num_pending_tokens
            sequence.num_pending_tokens = pending + 1 if pending < last_in_ring else 0

    def check_integrity(self) -> None:
        """Ownership is whole and the queues are in order. Raises AssertionError."""
        self.blocks.check_integrity(self.running)
        self.slots.check_integrity(self.running)
        for queue, status in ((self.waiting, Status.WAITING), (self.running, Status.RUNNING)):
            assert all(sequence.status is status for sequence in queue)
            assert queue == sorted(queue, key=lambda s: s.order)
        for sequence in self.waiting:
            assert sequence.state_slot is None and not sequence.block_table
            assert sequence.num_computed_tokens == sequence.num_pending_tokens == 0
        for sequence in self.running:
            assert 0 <= sequence.num_pending_tokens < max(1, self.ring_size)
        assert len(self._by_id) == len(self.waiting) + len(self.running)

    def _next_chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens to compute of a prompt. One that others wait for stops before its last."""
        num_new = sequence.num_uncomputed_tokens
        if sequence in self._leaders:
            num_new -= 1
        return min(num_new, budget)

    def _copy_prompts(self) -> tuple[list[Copy], set[Sequence]]:
        """Give the siblings of those that have reached their prompt's last token what these have computed; a sibling
        that finds no room computes for itself. Also returns those that wait for siblings to arrive."""
        copies: list[Copy] = []
        held: set[Sequence] = set()
        for leader in [leader for leader in self._leaders if leader.is_at_last_prompt_token]:
            self._leaders[leader] -= 1
            is_whole = len(leader.siblings) == leader.num_siblings and all(s.is_ready for s in leader.siblings)
            if not is_whole and self._leaders[leader]:
                held.add(leader)
                continue
            for sibling in leader.siblings:
                total = leader.num_prompt_tokens
                if (
                    sibling.is_ready
                    and self.slots.num_free
                    and self.blocks.missing(sibling, total) <= self.blocks.num_free
                ):
                    self.waiting.remove(sibling)
                    copies.append(self._start_as_copy(sibling, leader))
            self._disband(leader)
        return copies, held

    def _start_as_copy(self, sibling: Sequence, leader: Sequence) -> Copy:
        self.slots.take(sibling)
        self.blocks.grow(sibling, leader.num_prompt_tokens)
        sibling.status = Status.RUNNING
        sibling.deadline = math.inf
        sibling.num_computed_tokens = leader.num_computed_tokens
        bisect.insort(self.running, sibling, key=lambda s: s.order)
        assert leader.state_slot is not None and sibling.state_slot is not None
        filled = self.blocks.blocks_for(leader.num_computed_tokens)
        return Copy(
            leader.state_slot, sibling.state_slot, [*leader.block_table[:filled]], [*sibling.block_table[:filled]]
        )

    def _disband(self, leader: Sequence) -> None:
        """From here on everybody goes his own way."""
        self._leaders.pop(leader, None)
        for sibling in leader.siblings:
            sibling.leader = None
        leader.siblings = []

    def _admit(self, scheduled: dict[Sequence, int], budget: int) -> None:
        for sequence in self.waiting.copy():
            if budget <= 0 or not self.slots.num_free:
                return
            if sequence.leader is not None or not sequence.is_ready:
                continue
            num_new = self._next_chunk(sequence, budget)
            # Room for the whole sequence as it is, not for one chunk: else a long prompt would be fed half-way and
            # put out again. Whoever runs has its blocks already, or there would be no budget left.
            if self.blocks.missing(sequence, sequence.num_tokens) > self.blocks.num_free:
                return
            self.waiting.remove(sequence)
            self.slots.take(sequence)
            self.blocks.grow(sequence, num_new)
            sequence.status = Status.RUNNING
            sequence.deadline = math.inf
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            scheduled[sequence] = num_new
            budget -= num_new

    def _make_room(self, sequence: Sequence, num_new: int, *scheduled: dict[Sequence, int]) -> bool:
        """Give `sequence` the blocks for num_new more tokens, preempting from the end. False if it fell itself."""
        total = sequence.num_computed_tokens + num_new
        if sequence.status is not Status.RUNNING:  # preempted for one before it
            return False
        while self.blocks.missing(sequence, total) > self.blocks.num_free:
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
        sequence.status = Status.WAITING
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        self.slots.release(sequence)
        sequence.is_counted = False
