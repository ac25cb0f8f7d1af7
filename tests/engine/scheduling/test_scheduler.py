"""The scheduling policy without a model: thousands of requests come, go, fall and rise again."""

from __future__ import annotations

import gc
import random

import pytest
from engines import sequence
from leyden.engine.errors import ContextLengthError, QueueFullError
from leyden.engine.memory.operations import Fold, Fork, Move, Operation, Restore, Save
from leyden.engine.memory.ring import RingRule
from leyden.engine.memory.slots import SlotManager
from leyden.engine.prefix.ladder import Ladder
from leyden.engine.prefix.reuse import MAX_WAITS
from leyden.engine.scheduling.scheduler import MANY_ROWS, Scheduler
from leyden.engine.scheduling.step import ScheduledBatch
from leyden.engine.scheduling.waiting import MAX_PASSED
from leyden.engine.sequence import UNSEEN, Sequence, Status
from schedulers import Launched, deliver, launch, make_scheduler, rows, step

EOS = 0


class Device:
    """What a device would hold, and what would go wrong there: a state is the tokens that it has absorbed, a block the
    tokens that were written to it, and a row must find those of its sequence wherever it reads."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self.scheduler = scheduler
        self.rng = rng
        self.states: dict[int, tuple[int, ...]] = {}
        self.pending: dict[int, int] = {}  # of these tokens, how many wait in the ring
        self.snapshots: dict[int, tuple[int, ...]] = {}
        self.blocks: dict[int, dict[int, int]] = {}  # by offset
        self.drawn: dict[str, list[int]] = {}
        self.num_computed = 0

    def run(self, batch: ScheduledBatch) -> None:
        for operation in batch.operations:
            self.apply(operation)
        for row, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
            self.check(row)
            self.compute(row, count)
        assert len({snapshot.snapshot for snapshot in batch.snapshots}) == len(batch.snapshots), "written twice"
        assert batch.snapshots == sorted(batch.snapshots), "kernels take the places of a row together, and in order"
        for row, count, snapshot in batch.snapshots:
            each = batch.sequences[row]
            assert row < batch.num_prefills and 0 < count <= batch.num_scheduled_tokens[row]
            self.snapshots[snapshot] = tuple(self.tokens(each)[: each.num_computed_tokens + count])
        for row in batch.completing_rows:
            each = batch.sequences[row]
            if each.max_tokens:
                drawn = self.drawn.setdefault(each.request_id, [])
                assert len(drawn) >= each.num_output_tokens
                drawn[each.num_output_tokens :] = [self.rng.randint(0, 9)]

    def tokens(self, row: Sequence) -> list[int]:
        return row.prompt_token_ids + self.drawn.get(row.request_id, [])

    def check(self, row: Sequence) -> None:
        """The row's past is where the row looks for it."""
        past, size = self.tokens(row)[: row.num_computed_tokens], self.scheduler.blocks.block_size
        assert not past or self.states[row.state_slot] == tuple(past), "another's state"
        assert not past or self.pending[row.state_slot] == row.num_pending_tokens
        for at, token in enumerate(past):
            assert self.blocks[row.block_table[at // size]][at % size] == token, "other keys and values"

    def compute(self, row: Sequence, count: int) -> None:
        start, size = row.num_computed_tokens, self.scheduler.blocks.block_size
        is_decoding = row.is_decoding
        for at in range(start, start + count):
            block = row.block_table[at // size]
            self.blocks.setdefault(block, {})[at % size] = self.tokens(row)[at]
        self.states[row.state_slot] = tuple(self.tokens(row)[: start + count])
        ring = self.scheduler.ring.capacity
        self.pending[row.state_slot] = (row.num_pending_tokens + 1) % ring if is_decoding and ring else 0
        self.num_computed += count

    def apply(self, operation: Operation) -> None:
        match operation:
            case Fork(source, target, blocks):
                assert self.pending[source] == 0, "tokens in a ring stay behind"
                self.states[target], self.pending[target] = self.states[source], 0
                self.copy_blocks(blocks)
            case Fold(slot, num_pending, num_computed_tokens):
                assert num_pending == self.pending[slot] and num_computed_tokens == len(self.states[slot])
                self.pending[slot] = 0
            case Save(slot, snapshot):
                assert self.pending[slot] == 0
                self.snapshots[snapshot] = self.states[slot]
            case Restore(snapshot, slot, blocks):
                self.states[slot], self.pending[slot] = self.snapshots[snapshot], 0
                self.copy_blocks(blocks)
            case Move(source, target):
                self.snapshots[target] = self.snapshots[source]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        for source, target in pairs:
            assert source != target
            self.blocks[target] = dict(self.blocks[source])


class Simulation:
    """Random arrivals and aborts against one scheduler, with every law checked after every step. Where `lags`, the
    tokens of a step arrive after the next one is launched."""

    def __init__(self, seed: int, lags: bool, cached: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.cached = cached
        self.lags = lags
        self.in_flight: Launched = []
        slots = rng.randint(1, 6)
        self.scheduler = make_scheduler(
            blocks=rng.randint(2, 24),
            block_size=rng.choice([1, 2, 4, 16]),
            slots=slots,
            budget=rng.randint(slots, slots + rng.choice([0, 3, 40])),
            mixed=rng.choice([None, 1, 5]),
            max_waiting=rng.choice([3, 1000]),
            ring=rng.choice([RingRule(), RingRule(16, replays=True)]),
            snapshots=rng.choice([1, 3, 50]) if cached else 0,
            on_host=rng.choice([0, 0, 2]) if cached else 0,
            min_tokens=rng.choice([1, 1, 2, 5]),
            interval=rng.choice([3, 1000]),
        )
        self.device = Device(self.scheduler, rng)
        self.known: list[list[int]] = [[1] * 60, [1, 2, 3] * 20]  # what prompts begin with
        self.has_priorities = rng.random() < 0.4
        self.num_arrivals = 0
        self.alive: dict[str, Sequence] = {}
        self.finished: list[Sequence] = []
        self.num_aborted = self.num_refused = self.num_fallen = self.num_copied = 0
        self.expected: list[tuple[str, list[int], str]] = []  # siblings still to come: of whom, prompt, their id

    def run(self, num_requests: int) -> None:
        idle_limit = 200_000
        while self.num_arrivals < num_requests or self.scheduler.has_work or self.in_flight or self.expected:
            while self.num_arrivals < num_requests and self.rng.random() < 0.4:
                self.arrive()
            while self.expected and self.rng.random() < 0.7:
                self.arrive_sibling(*self.expected.pop(0))
            if self.alive and self.rng.random() < 0.05:
                self.abort(self.rng.choice(list(self.alive)))
            self.step()
            idle_limit -= 1
            assert idle_limit, "somebody starves"

    def arrive(self) -> None:
        self.num_arrivals += 1
        capacity = self.scheduler.blocks.num_blocks * self.scheduler.blocks.block_size
        prompt = self.prompt(self.rng.choice([1, 1, 2, self.rng.randint(1, capacity)]))
        num_siblings = self.rng.randint(1, 4) if self.rng.random() < 0.4 else 0
        name = f"r{self.num_arrivals}"
        if self.add(self.make(prompt, name, num_siblings=num_siblings)):
            self.expected += [(name, prompt, f"{name}-{i}") for i in range(num_siblings)]

    def arrive_sibling(self, leader: str, prompt: list[int], name: str) -> None:
        self.num_arrivals += 1
        self.add(self.make(prompt, name, sibling_of=leader))

    def prompt(self, length: int) -> list[int]:
        """A beginning that others have, too, and some tokens of its own."""
        known = self.rng.choice(self.known)
        shared = known[: self.rng.randint(0, min(len(known), length))]
        return shared + [self.rng.randint(1, 4) for _ in range(length - len(shared))]

    def make(self, prompt: list[int], name: str, **fields) -> Sequence:
        return sequence(
            prompt,
            prefix_cache=self.cached and self.rng.random() < 0.9,
            cache_salt=self.rng.choice([None, None, "a"]),
            request_id=name,
            max_tokens=self.rng.randint(1, 12),
            arrival=self.num_arrivals,
            priority=self.rng.choice([-1, 0, 0, 2]) if self.has_priorities else 0,
            eos_token_ids=[EOS],
            ignore_eos=self.rng.random() < 0.5,
            **fields,
        )

    def add(self, new: Sequence) -> bool:
        capacity = self.scheduler.blocks.num_blocks * self.scheduler.blocks.block_size
        waiting = len(self.scheduler.waiting)
        try:
            self.scheduler.add(new)
        except QueueFullError:
            assert waiting >= self.scheduler.max_waiting
            self.num_refused += 1
        except ContextLengthError:
            assert new.num_prompt_tokens + new.max_tokens - 1 > capacity
            self.num_refused += 1
        else:
            assert waiting < self.scheduler.max_waiting + self.scheduler.slots.num_slots
            self.alive[new.request_id] = new
        return new.request_id in self.alive

    def abort(self, request_id: str) -> None:
        assert self.scheduler.abort(request_id)
        assert not self.scheduler.abort(request_id), "a second abort finds nothing"
        gone = self.alive.pop(request_id)
        assert gone.status is Status.FINISHED and gone.state_slot is None and not gone.block_table
        self.num_aborted += 1
        self.scheduler.check_integrity()

    def step(self) -> None:
        waiting_before = list(self.scheduler.waiting)
        preemptions = self.scheduler.num_preemptions
        batch = self.scheduler.schedule()
        self.check(batch, waiting_before)
        self.device.run(batch)
        self.num_fallen += self.scheduler.num_preemptions - preemptions
        launched = launch(self.scheduler, batch)
        if self.lags:
            launched, self.in_flight = self.in_flight, launched
        for done in deliver(self.scheduler, launched, self.device.drawn):
            del self.alive[done.request_id]
            self.finished.append(done)
            self.known.append(done.prompt_token_ids + done.output_token_ids)
        self.scheduler.check_integrity()

    def check(self, batch: ScheduledBatch, waiting_before: list[Sequence]) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        patient = {s for s in scheduler.running if s.is_at_last_prompt_token and s in scheduler._siblings}
        idle = not scheduler.has_work or self.in_flight or patient
        assert not batch.is_empty or idle, "work is there and nothing runs"
        self.check_operations(batch)
        assert len(set(map(id, batch.sequences))) == len(batch.sequences)
        assert sum(batch.num_scheduled_tokens) <= scheduler.max_num_batched_tokens
        if any(s not in waiting_before for s in batch.sequences[batch.num_prefills :]):
            assert sum(batch.num_scheduled_tokens[: batch.num_prefills]) <= scheduler.mixed_prefill_tokens
        assert [s.is_decoding for s in batch.sequences] == [False] * batch.num_prefills + [True] * (
            len(batch.sequences) - batch.num_prefills
        ), "prefill rows come first"
        in_batch = {id(s) for s in batch.sequences}
        for running in (s for s in scheduler.running if s not in waiting_before):
            assert id(running) in in_batch or not running.is_decoding or running in patient, (
                "a decoding sequence missed its token"
            )
        for row, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
            assert row.status is Status.RUNNING and row.state_slot is not None
            assert 1 <= count <= row.num_uncomputed_tokens
            start = row.num_computed_tokens
            assert row.is_decoding or UNSEEN not in row.token_ids(start, start + count), "an unseen token in a prompt"
            held = len(row.block_table)
            assert scheduler.blocks.blocks_for(row.num_computed_tokens + count) <= held
            assert held <= scheduler.blocks.blocks_for(row.num_tokens), "blocks are held for nothing"
        still = {id(s) for s in scheduler.waiting}
        copied = {operation.target_slot for operation in batch.operations if isinstance(operation, Fork)}
        admitted = [s.priority for s in waiting_before if id(s) not in still and s.state_slot not in copied]
        left_behind = [s.priority for s in waiting_before if s in set(scheduler.waiting.ready())]
        assert all(scheduler.waiting.num_passed(s) <= MAX_PASSED for s in scheduler.waiting)
        is_in_order = not admitted or not left_behind or max(admitted) <= min(left_behind)
        assert self.cached or is_in_order, "one of lower priority jumped the queue"

    def check_operations(self, batch: ScheduledBatch) -> None:
        by_slot = {s.state_slot: s for s in self.scheduler.running}
        for operation in batch.operations:
            if not isinstance(operation, Fork):
                continue
            self.num_copied += 1
            leader, sibling = by_slot.get(operation.source_slot), by_slot.get(operation.target_slot)
            assert operation.source_slot != operation.target_slot
            if leader is None or sibling is None or sibling.num_computed_tokens == 0:
                continue  # fell since, for one before it
            if leader.prompt_token_ids != sibling.prompt_token_ids:
                continue  # the same, and somebody has its slot: the device knows whose state the operation brought
            assert leader.is_at_last_prompt_token and sibling.is_at_last_prompt_token
            assert sibling.num_pending_tokens == 0

    def check_end(self) -> None:
        scheduler = self.scheduler
        assert not self.alive, "every request that was not aborted finishes"
        for done in self.finished:
            assert done.status is Status.FINISHED and done.state_slot is None and not done.block_table
            stopped = done.output_token_ids[-1] == EOS and not done.sampling_params.ignore_eos
            assert done.num_output_tokens == done.max_tokens or stopped
            if not done.sampling_params.ignore_eos:
                assert EOS not in done.output_token_ids[:-1], "went on past its end"
        assert scheduler.blocks.num_used == 0
        scheduler.cache.clear()
        scheduler.cache.check_integrity()
        assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
        assert scheduler.cache.num_snapshots_used == scheduler.cache.num_host_snapshots_used == 0
        assert scheduler.slots.num_free == scheduler.slots.num_slots
        assert self.num_refused + self.num_aborted + len(self.finished) == self.num_arrivals


@pytest.mark.parametrize(("ring_size", "expected"), [(0, [0, 0, 0, 0, 0, 0]), (4, [0, 1, 2, 3, 0, 1])])
def test_decoded_tokens_wait_until_their_ring_is_full(ring_size, expected):
    scheduler = make_scheduler(ring=RingRule(ring_size, replays=ring_size > 0))
    row = sequence(3, max_tokens=20)
    scheduler.add(row)
    counts = []
    for _ in expected:
        step(scheduler)
        counts.append(row.num_pending_tokens)
    assert counts == expected


def test_nothing_waits_after_a_preemption():
    scheduler = make_scheduler(blocks=4, block_size=1, ring=RingRule(16, replays=True))
    first, second = sequence(1, request_id="a", max_tokens=4), sequence(1, request_id="b", max_tokens=4, arrival=1)
    scheduler.add(first)
    scheduler.add(second)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert first.num_pending_tokens > 0
    assert (second.status, second.num_pending_tokens) == (Status.WAITING, 0)
    step(scheduler)


@pytest.mark.parametrize("lags", [False, True])
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_thousands_of_random_requests_keep_every_law(lags, cached):
    fallen = refused = aborted = finished = copied = hits = 0
    for seed in range(80):
        simulation = Simulation(seed, lags, cached)
        simulation.run(num_requests=50)
        simulation.check_end()
        fallen += simulation.num_fallen
        refused += simulation.num_refused
        aborted += simulation.num_aborted
        finished += len(simulation.finished)
        copied += simulation.num_copied
        hits += simulation.scheduler.reuse.num_cached_tokens
    assert (hits > 500) == cached
    assert min(fallen, refused, aborted, finished, 2 * copied) > 100, "every case must be met to prove anything"


def test_one_token_prompt_is_a_prefill_row():
    scheduler = make_scheduler()
    scheduler.add(sequence(1, request_id="old", max_tokens=5, arrival=1))
    assert scheduler.schedule().num_prefills == 1
    scheduler = make_scheduler()
    scheduler.add(sequence(1, request_id="old", max_tokens=5, arrival=1))
    step(scheduler)
    scheduler.add(sequence(1, request_id="new", max_tokens=5, arrival=2))
    batch = step(scheduler)
    assert rows(batch) == [("new", 1), ("old", 1)] and batch.num_prefills == 1


def test_decoding_rows_get_their_token_before_a_long_prompt_takes_the_rest_of_the_budget():
    scheduler = make_scheduler(blocks=64, budget=8)
    for i in range(3):
        scheduler.add(sequence(2, request_id=f"d{i}", max_tokens=9, arrival=i))
    step(scheduler)
    scheduler.add(sequence(30, request_id="long", max_tokens=2, arrival=9))
    chunks = []
    for _ in range(6):
        batch = step(scheduler)
        assert {"d0", "d1", "d2"} <= {name for name, _ in rows(batch)}
        chunks += [count for name, count in rows(batch) if name == "long"]
    assert chunks == [5, 5, 5, 5, 5, 5]


def test_prompts_bring_few_tokens_beside_decoding_rows_and_many_without():
    scheduler = make_scheduler(budget=16, mixed=3)
    scheduler.add(sequence(2, request_id="a", max_tokens=3))
    scheduler.add(sequence(10, request_id="b", arrival=1))
    assert rows(step(scheduler)) == [("a", 2), ("b", 10)]
    scheduler.abort("b")
    scheduler.add(sequence(9, request_id="c", arrival=2))
    assert rows(step(scheduler)) == [("c", 3), ("a", 1)]
    assert rows(step(scheduler)) == [("c", 3), ("a", 1)]
    assert rows(step(scheduler)) == [("c", 3)], "the last of a has come; c ends"


def test_a_request_that_waits_for_blocks_makes_the_cache_forget_nothing():
    scheduler = make_scheduler(blocks=20, block_size=4, slots=3, budget=100, snapshots=4)
    kept = sequence(9, request_id="kept", max_tokens=1, prefix_cache=True)
    scheduler.add(kept)
    step(scheduler)
    step(scheduler)
    scheduler.add(sequence(30, request_id="runs", arrival=1, max_tokens=9))
    step(scheduler)
    cached = scheduler.blocks.num_cached
    scheduler.add(sequence(70, request_id="waits", arrival=2, max_tokens=1))
    assert [name for name, _ in rows(step(scheduler))] == ["runs"]
    assert scheduler.blocks.num_cached == cached > 0
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.blocks.num_cached < cached, "alone it gets them"


def test_a_prompt_is_not_begun_with_blocks_that_one_under_way_needs():
    scheduler = make_scheduler(blocks=20, block_size=4, slots=2, budget=64, snapshots=4)
    first = sequence(48, request_id="first", max_tokens=1, prefix_cache=True, beginning=4)
    scheduler.add(first)
    scheduler.add(sequence(48, request_id="second", arrival=1, max_tokens=1))
    assert rows(step(scheduler)) == [("first", 4)]
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(("num_decoding", "brought"), [(MANY_ROWS - 1, 3), (MANY_ROWS, 6)])
def test_prompts_bring_twice_as_many_beside_many_decoding_rows(num_decoding, brought):
    scheduler = make_scheduler(blocks=300, slots=MANY_ROWS + 1, max_waiting=MANY_ROWS, budget=500, mixed=3)
    for i in range(num_decoding):
        scheduler.add(sequence(2, request_id=f"d{i}", arrival=i, max_tokens=3))
    assert len(step(scheduler).sequences) == num_decoding
    scheduler.add(sequence(9, request_id="prompt", arrival=num_decoding))
    assert rows(step(scheduler))[0] == ("prompt", brought)


def test_prompt_is_cut_to_the_budget_and_sampled_only_when_complete():
    scheduler = make_scheduler(blocks=64, budget=4, slots=2)
    long = sequence(10, max_tokens=2)
    scheduler.add(long)
    assert [rows(step(scheduler)) for _ in range(3)] == [[("s", 4)], [("s", 4)], [("s", 2)]]
    assert long.num_output_tokens == 1


def test_lower_priority_value_runs_first_and_ties_run_in_order_of_arrival():
    scheduler = make_scheduler(slots=1, budget=4)
    for arrival, priority in enumerate([5, 0, 5, -1, 0]):
        scheduler.add(
            sequence(1, request_id=f"p{priority}a{arrival}", priority=priority, arrival=arrival, max_tokens=1)
        )
    order = []
    while scheduler.has_work:
        order += [name for name, _ in rows(step(scheduler))]
    assert order == ["p-1a3", "p0a1", "p0a4", "p5a0", "p5a2"]


def test_preemption_frees_the_last_in_order_which_is_recomputed():
    scheduler = make_scheduler(blocks=4, block_size=2, slots=2, budget=16)
    first = sequence(3, request_id="first", max_tokens=6, arrival=1)
    second = sequence(3, request_id="second", max_tokens=3, arrival=2)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)  # both hold 2 blocks
    step(scheduler)
    assert (first.num_tokens, second.num_tokens, scheduler.blocks.num_free) == (5, 5, 0)
    batch = step(scheduler)  # first needs a third block
    assert rows(batch) == [("first", 1)] and scheduler.num_preemptions == 1
    assert second.status is Status.WAITING and second.num_computed_tokens == 0
    assert not second.block_table and second.state_slot is None
    assert second.output_token_ids == [7, 7], "what was sampled stays sampled"
    while first.status is not Status.FINISHED:
        batch = step(scheduler)
    batch = step(scheduler)
    assert rows(batch) == [("second", 5)] and batch.num_prefills == 1, "prompt and answer together, as one prefill"
    assert second.status is Status.FINISHED and second.output_token_ids == [7, 7, 7]


def test_one_that_falls_for_a_prompt_leaves_the_step_that_it_was_chosen_for():
    """A later decoding row, which is chosen first, has grown into the blocks that an earlier long prompt needs."""
    scheduler = make_scheduler(blocks=11, block_size=4, budget=8, mixed=4)
    scheduler.add(sequence(40, request_id="long", arrival=1, max_tokens=4))
    scheduler.add(sequence(3, request_id="later", arrival=2, max_tokens=30, ignore_eos=True))
    while not scheduler.num_preemptions:
        before = rows(step(scheduler))
    assert before == [("long", 4)] and [s.request_id for s in scheduler.waiting] == ["later"]
    while scheduler.has_work:
        step(scheduler)


def test_preempted_sequence_keeps_its_place_before_later_arrivals():
    scheduler = make_scheduler(blocks=4, block_size=2, slots=2, budget=16)
    for arrival, name in enumerate(("first", "second")):
        scheduler.add(sequence(3, request_id=name, max_tokens=6, arrival=arrival))
    step(scheduler)
    scheduler.add(sequence(1, request_id="late", max_tokens=1, arrival=9))
    while not scheduler.num_preemptions:
        step(scheduler)
    assert [s.request_id for s in scheduler.waiting] == ["second", "late"]


def test_queue_is_bounded_by_max_waiting_beyond_the_free_slots():
    scheduler = make_scheduler(slots=2, max_waiting=3, budget=2)
    for i in range(5):
        scheduler.add(sequence(1, request_id=f"r{i}", arrival=i, max_tokens=4))
    with pytest.raises(QueueFullError, match="max_waiting = 3"):
        scheduler.add(sequence(1, request_id="one too many", arrival=9))
    assert "one too many" not in scheduler and len(scheduler.waiting) == 5
    step(scheduler)
    assert len(scheduler.waiting) == 3
    with pytest.raises(QueueFullError):
        scheduler.add(sequence(1, request_id="still too many", arrival=10))
    scheduler.abort("r4")
    scheduler.add(sequence(1, request_id="fits", arrival=11))


def test_request_is_refused_at_once_exactly_where_it_never_fits():
    scheduler = make_scheduler(blocks=2, block_size=4)
    with pytest.raises(ContextLengthError, match="holds 8"):
        scheduler.add(sequence(5, request_id="big", max_tokens=5))
    assert not scheduler.has_work
    exact = sequence(5, max_tokens=4)  # the last sampled token is never fed back
    scheduler.add(exact)
    while scheduler.has_work:
        step(scheduler)
    assert exact.num_output_tokens == 4 and scheduler.num_preemptions == 0


def test_two_long_prompts_do_not_starve_each_other_of_blocks_half_way():
    scheduler = make_scheduler(blocks=6, block_size=2, slots=2, budget=3)
    for arrival in range(2):
        scheduler.add(sequence(10, request_id=f"r{arrival}", max_tokens=1, arrival=arrival))
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_preemptions == 0


def test_a_slot_or_block_returned_twice_or_lost_is_found():
    for corrupt in (
        lambda s: s.slots._free.append(s.running[0].state_slot),
        lambda s: s.slots._free.pop(),
        lambda s: s.blocks._free.append(s.running[0].block_table[0]),
        lambda s: s.running[0].block_table.pop(),
    ):
        scheduler = make_scheduler()
        scheduler.add(sequence(5, max_tokens=3))
        step(scheduler)
        corrupt(scheduler)
        with pytest.raises(AssertionError):
            scheduler.check_integrity()


def test_manager_refuses_to_take_or_return_a_slot_twice():
    slots, owner = SlotManager(2), sequence(1)
    slots.take(owner)
    with pytest.raises(AssertionError):
        slots.take(owner)
    slots.release(owner)
    with pytest.raises(AssertionError):
        slots.release(owner)
    assert slots.num_free == 2


def test_token_ids_run_over_the_border_of_prompt_and_answer():
    both = sequence([10, 11, 12], output=(20, 21))
    whole = [10, 11, 12, 20, 21]
    for start in range(6):
        for end in range(start, 6):
            assert both.token_ids(start, end) == whole[start:end]


# -- scheduling that knows the cache ----------------------------------------------------------------------------------


def cached(prompt: list[int], request_id: str, arrival: int, **fields) -> Sequence:
    return sequence(prompt, request_id=request_id, arrival=arrival, prefix_cache=True, **({"max_tokens": 1} | fields))


def run_alone(scheduler: Scheduler, each: Sequence) -> None:
    scheduler.add(each)
    while scheduler.has_work:
        step(scheduler)


def test_waiting_prompt_with_the_most_cached_tokens_goes_first():
    scheduler = make_scheduler(blocks=40, slots=1, budget=64, snapshots=8)
    run_alone(scheduler, cached([5] * 20, "warm", 0))
    scheduler.add(cached([9] * 20, "cold", 1))
    scheduler.add(cached([5] * 19 + [6], "near", 2))
    scheduler.add(cached([5] * 20, "nearest", 3))
    scheduler.add(cached([5] * 20, "urgent but cold", 4, priority=-1))
    order = []
    while scheduler.has_work:
        order += [s.request_id for s in step(scheduler).sequences if s.request_id not in order]
    assert order == ["urgent but cold", "near", "nearest", "cold"]


@pytest.mark.parametrize("arrivals_per_step", [1, 3])
def test_waiting_request_is_not_passed_over_for_ever(arrivals_per_step):
    """Hits keep coming, and a prompt that is not cached has its turn nevertheless."""
    scheduler = make_scheduler(blocks=60, slots=1, budget=64, snapshots=8, max_waiting=10_000)
    run_alone(scheduler, cached([5] * 20, "warm", 0))
    cold = cached([9] * 20, "cold", 1)
    scheduler.add(cold)
    num_before = arrival = 0
    while cold.status is Status.WAITING:
        for _ in range(arrivals_per_step):
            arrival += 1
            scheduler.add(cached([5] * 20, f"hit {arrival}", 1 + arrival))
        passed = scheduler.waiting.num_passed(cold)
        step(scheduler)
        num_before += cold.status is Status.WAITING
        assert num_before < 10 * MAX_PASSED, "starved"
    assert passed == MAX_PASSED


def test_only_prompts_that_share_a_beginning_wait_for_one_under_way():
    scheduler = make_scheduler(blocks=60, slots=4, budget=8, snapshots=8)
    scheduler.add(cached([5] * 20 + [1, 2, 3], "first", 1))
    scheduler.add(cached([5] * 20 + [7, 8, 9], "second", 2))
    scheduler.add(cached([4] * 6, "other", 3))
    seen = []
    while scheduler.has_work:
        seen.append(rows(step(scheduler)))
    counts = {}
    for name, count in (row for batch in seen for row in batch):
        counts[name] = counts.get(name, 0) + count
    assert counts == {"first": 23, "second": 3, "other": 6}
    started = {name: next(i for i, batch in enumerate(seen) if name in dict(batch)) for name in counts}
    assert started["other"] < started["second"], "it has nothing to wait for"


def test_a_sequence_waits_for_four_others_at_most():
    scheduler = make_scheduler(blocks=400, slots=40, budget=24, snapshots=8)
    each = [cached([5] * 60 + [number], f"r{number}", number) for number in range(10)]
    for waiting in each:
        scheduler.add(waiting)
    for number in range(9):
        step(scheduler)
        is_awaiting = scheduler.reuse.awaited(each[-1]) is not None
        assert each[number].status is Status.RUNNING and is_awaiting == (number < MAX_WAITS)
        scheduler.abort(f"r{number}")


def test_a_prompt_is_seen_behind_many_that_wait_for_another():
    scheduler = make_scheduler(blocks=400, slots=40, budget=24, snapshots=8)
    scheduler.add(cached([5] * 60 + [1], "under way", 0))
    step(scheduler)
    for number in range(1, 25):
        scheduler.add(cached([5] * 60 + [1 + number], f"r{number}", number))
    scheduler.add(cached([4] * 90, "other", 99))
    assert rows(step(scheduler)) == [("under way", 24)]
    assert rows(step(scheduler)) == [("under way", 12), ("other", 12)]


def test_follower_of_an_aborted_prompt_goes_on_alone():
    scheduler = make_scheduler(blocks=60, slots=4, budget=8, snapshots=8)
    scheduler.add(cached([5] * 20 + [1, 2, 3], "first", 1))
    scheduler.add(cached([5] * 20 + [7, 8, 9], "second", 2))
    assert rows(step(scheduler)) == [("first", 8)]
    scheduler.abort("first")
    assert rows(step(scheduler)) == [("second", 8)]
    while scheduler.has_work:
        step(scheduler)


def test_sequence_keeps_no_leader_alive_after_its_wait():
    """Each of a long row of prompts waits for the one before it, which has waited itself."""
    scheduler = make_scheduler(blocks=200, slots=20, budget=8, snapshots=8)
    before = num_alive()
    for number in range(20):
        last = cached(list(range(10 + 10 * number)), f"r{number}", number, max_tokens=9)
        scheduler.add(last)
        waited = False
        while last.status is Status.WAITING:
            step(scheduler)
            waited |= scheduler.reuse.awaited(last) is not None
        assert waited == (number > 0)
    while scheduler.has_work or step(scheduler).sequences:
        step(scheduler)
    assert num_alive() - before == 1, "the last, which the test has"


def num_alive() -> int:
    gc.collect()
    return sum(type(each) is Sequence for each in gc.get_objects())


# -- states on the way of a prompt ------------------------------------------------------------------------------------


def long_scheduler(**fields) -> Scheduler:
    """With the server's default budgets and distances."""
    defaults = {"blocks": 8000, "block_size": 16, "budget": 2048, "mixed": 256, "snapshots": 400, "min_tokens": 128}
    return make_scheduler(**(defaults | {"interval": 4096} | fields))


@pytest.mark.parametrize("beside", [0, 2], ids=["alone", "beside decoding rows"])
def test_second_prompt_finds_three_quarters_of_its_shared_tokens(beside):
    """The law of the state's distances, by pairs of random prompts whose parting is the first."""
    rng = random.Random(beside)
    for pair in range(12):
        scheduler = long_scheduler()
        for i in range(beside):
            scheduler.add(sequence(4, request_id=f"d{i}", arrival=i, max_tokens=1000, ignore_eos=True))
            step(scheduler)
        length = rng.choice([513, rng.randint(514, 3000), rng.randint(3000, 16_000)])
        shared = rng.choice([512, length - 1, rng.randint(512, length - 1), int(512 * (length / 512) ** rng.random())])
        prompt = rng.choices(range(1, 9), k=length)
        first = cached(prompt, "first", 10)
        scheduler.add(first)
        num_steps = 0
        while first.status is not Status.FINISHED:
            step(scheduler)
            num_steps += 1
        budget = 256 if beside else 2048
        assert num_steps <= -(-(length - 1) // budget) + 1, "on its way a state costs no step"
        own = rng.choices(range(10, 19), k=rng.randint(1, 600))
        second = cached(prompt[:shared] + own, "second", 11)
        scheduler.add(second)
        while second.status is not Status.FINISHED:
            step(scheduler)
        assert 3 / 4 * shared <= scheduler.reuse.num_cached_tokens <= shared, (pair, length, shared)
        assert scheduler.reuse.num_queried_tokens == length + second.num_prompt_tokens


@pytest.mark.parametrize("budget", [7, 2048])
def test_a_prompt_passes_each_rung_of_its_ladder_once_and_none_where_it_is_saved_anyway(budget):
    rungs = [at for at, _ in Ladder(4, 30).between(0, 500)]
    for length in {rung + more for rung in rungs[2:6] for more in range(4)}:
        scheduler = long_scheduler(budget=budget, min_tokens=4, interval=30)
        prompt = cached(list(range(length)), "prompt", 1, max_tokens=100)
        scheduler.add(prompt)
        passed = []
        for _ in range(length // budget + 40):
            batch = scheduler.schedule()
            passed += [batch.sequences[each.row].num_computed_tokens + each.num_tokens for each in batch.snapshots]
            deliver(scheduler, launch(scheduler, batch))
        assert prompt.num_output_tokens > 30
        assert sorted(passed) == [at for at in rungs if at < length - 1], "its last token but one is a stop"


def test_where_places_are_scarce_the_rungs_that_stay_longest_get_them():
    """An eighth of the places are for rungs, however many other snapshots there are; without rungs none are."""
    for interval, num_places in ((100, 8), (0, 0)):
        scheduler = long_scheduler(snapshots=64, budget=4000, min_tokens=8, interval=interval)
        cache = scheduler.cache
        for i in range(70):
            run_alone(scheduler, cached([i] * 12, f"short {i}", i))
        assert cache.num_snapshots_used == 64 - num_places
        for start in (1000, 5000):
            run_alone(scheduler, cached(list(range(start, start + 2000)), f"long {start}", start))
            ladder = sorted(Ladder(8, interval).between(0, 1998), key=lambda rung: -rung[1])
            found = [(node.tokens[-1] + 1 - start, node.rung) for node in cache.tree.nodes if node.rung is not None]
            assert sorted(found) == sorted(ladder[:num_places])
            assert cache.num_snapshots_used == 64


def test_prompt_of_another_salt_or_without_the_cache_has_no_rungs():
    for first, second in [({"cache_salt": "a"}, {}), ({"prefix_cache": False}, {}), ({}, {"prefix_cache": False})]:
        scheduler = long_scheduler()
        prompt = [1] * 4000
        run_alone(scheduler, sequence(prompt, max_tokens=1, **({"prefix_cache": True} | first)))
        later = sequence(prompt[:3000] + [2] * 9, max_tokens=1, **({"prefix_cache": True} | second))
        run_alone(scheduler, later)
        assert scheduler.reuse.num_cached_tokens == 0


def test_after_a_preemption_a_prompt_goes_on_from_the_last_state_on_its_way():
    scheduler = long_scheduler(blocks=3000 + 4 * 20 + 20, block_size=1, slots=5)
    for i in range(4):
        scheduler.add(sequence(16, request_id=f"d{i}", max_tokens=40, ignore_eos=True, priority=-1, arrival=i))
    step(scheduler)
    prompt = cached(list(range(1, 3001)), "prompt", 5)
    scheduler.add(prompt)
    for _ in range(12):
        step(scheduler)
    assert scheduler.num_preemptions == 1
    done = max(node.end for node in scheduler.cache.tree.nodes)
    assert not prompt.output_token_ids, "it fell on its way"
    while prompt.status is Status.WAITING:
        step(scheduler)
    assert scheduler.reuse.num_cached(prompt) == 0, "what it computed itself is no hit"
    assert prompt.num_computed_tokens >= done > 1000


# -- what the cache spares, against lists by last use -----------------------------------------------------------------


class Listed:
    """The prefix cache as lists of texts by last use, where there are blocks enough: what requests that come one after
    another compute."""

    def __init__(self, num_snapshots: int, on_host: int, min_tokens: int) -> None:
        self.min_tokens = min_tokens
        self.sizes = (num_snapshots, on_host)
        self.tiers: tuple[list[tuple], list[tuple]] = ([], [])  # (salt, *tokens), least recently used first

    def request(self, prompt: list[int], salt: str | None) -> int:
        """Tokens that are computed for the prompt and one token of an answer."""
        text = (salt, *prompt)
        before = self.longest(text[:-1])
        shared = max((common(text[:-1], known) for tier in self.tiers for known in tier), default=1) - 1
        for tier in self.tiers:
            if before in tier:
                tier.append(tier.pop(tier.index(before)))
        start, stops = max(len(before) - 1, 0), []
        for stop in (shared, len(prompt) - 1):
            if stop > start and all(abs(stop - other) >= self.min_tokens for other in (start, *stops)):
                stops.append(stop)
        for stop in sorted(stops):
            self.save(text[: 1 + stop], self.min_tokens)
        self.save(text, min(self.min_tokens, 16))
        return len(prompt) - start

    def longest(self, text: tuple) -> tuple:
        return max((known for tier in self.tiers for known in tier if text[: len(known)] == known), key=len, default=())

    def save(self, text: tuple, min_tokens: int) -> None:
        if len(text) - max(len(self.longest(text)), 1) < min_tokens:
            return
        device, host = self.tiers
        device.append(text)
        if len(device) > self.sizes[0]:
            host.append(device.pop(0))
        if len(host) > self.sizes[1]:
            host.pop(0)


def common(a: tuple, b: tuple) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("seed", range(12))
def test_requests_compute_the_tokens_that_an_lru_model_lacks(seed):
    rng = random.Random(seed)
    sizes = {"snapshots": rng.choice([2, 5, 12]), "on_host": rng.choice([0, 3]), "min_tokens": rng.choice([1, 4, 20])}
    scheduler = make_scheduler(blocks=5000, block_size=rng.choice([1, 4]), budget=rng.choice([7, 100]), **sizes)
    listed = Listed(*sizes.values())
    texts = [[1] * 60]
    spared = 0
    for i in range(120):
        known = rng.choice(texts)
        prompt = known[: rng.randint(1, len(known))] + rng.choices(range(1, 4), k=rng.choice([1, 2, 30]))
        texts.append(prompt)
        salt = rng.choice([None, None, "a"])
        scheduler.add(cached(prompt, f"r{i}", i, cache_salt=salt))
        counted = 0
        while scheduler.has_work:
            counted += sum(step(scheduler).num_scheduled_tokens)
        assert counted == listed.request(prompt, salt), i
        spared += len(prompt) - counted
        cache = scheduler.cache
        used = (cache.num_snapshots_used, cache.num_host_snapshots_used)
        assert used == tuple(map(len, listed.tiers))
    assert scheduler.reuse.num_cached_tokens == spared > 100


@pytest.mark.parametrize("min_tokens", [1, 6])
@pytest.mark.parametrize("num_steps", range(0, 16, 3))
def test_a_third_prompt_finds_where_two_have_parted_however_far_one_was_when_the_other_came(min_tokens, num_steps):
    scheduler = make_scheduler(blocks=400, slots=3, budget=4, snapshots=20, min_tokens=min_tokens)
    scheduler.add(cached([5] * 30 + [1] * 30, "first", 1))
    for _ in range(num_steps):
        step(scheduler)
    scheduler.add(cached([5] * 30 + [2] * 9, "second", 2))
    while scheduler.has_work:
        step(scheduler)
    before = scheduler.reuse.num_cached_tokens
    run_alone(scheduler, cached([5] * 30 + [3] * 9, "third", 3))
    assert scheduler.reuse.num_cached_tokens - before == 30
