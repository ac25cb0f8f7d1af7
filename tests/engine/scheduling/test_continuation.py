"""Steps that follow from the one before are those that asking every sequence would have given."""

from __future__ import annotations

import itertools
import random

import pytest
from engines import sequence
from leyden.engine.errors import ContextLengthError, QueueFullError
from leyden.engine.memory.blocks import BlockManager
from leyden.engine.memory.ring import RingRule
from leyden.engine.scheduling.continuation import Continuation
from leyden.engine.scheduling.step import ScheduledBatch
from leyden.engine.sequence import Sequence, Status
from schedulers import make_scheduler

EOS_RATE = 0.04


class Twin:
    """A scheduler and what the engine does with it, moved by calls that others get too."""

    def __init__(self, settings: dict[str, int], lags: bool, *, follows: bool) -> None:
        self.scheduler = make_scheduler(
            blocks=settings["blocks"],
            block_size=settings["block_size"],
            slots=settings["slots"],
            budget=settings["budget"],
            ring=RingRule(settings["ring_size"], replays=settings["ring_size"] > 0),
        )
        if not follows:
            self.scheduler._continuation.advance = lambda: None
        self.lags = lags
        self.in_flight: list[tuple[Sequence, int]] = []

    def add(self, name: str, length: int, max_tokens: int, priority: int, arrival: int) -> None:
        numbers = {"max_tokens": max_tokens, "priority": priority, "arrival": arrival}
        self.scheduler.add(sequence(length, request_id=name, eos_token_ids=[0], **numbers))

    def step(self) -> ScheduledBatch:
        batch = self.scheduler.schedule()
        launched = [(s, s.num_output_tokens) for s in (batch.sequences[row] for row in batch.completing_rows)]
        self.scheduler.update(batch)
        if self.lags:
            launched, self.in_flight = self.in_flight, launched
        for each, index in launched:
            if each.status is not Status.FINISHED:
                self.take(each, index)
        self.scheduler.check_integrity()
        return batch

    def take(self, each: Sequence, index: int) -> None:
        is_end = random.Random(f"{each.request_id} {index}").random() < EOS_RATE
        each.output_token_ids[index] = 0 if is_end else 7
        if each.finish_reason(index) is not None:
            del each.output_token_ids[index + 1 :]
            self.scheduler.finish(each)


def described(batch: ScheduledBatch) -> list[tuple]:
    """All that the runner reads of a batch."""
    rows = zip(batch.sequences, batch.num_scheduled_tokens, strict=True)
    return [
        (
            s.request_id,
            n,
            s.state_slot,
            s.block_table.tolist(),
            s.num_computed_tokens,
            s.num_pending_tokens,
            s.num_tokens,
        )
        for s, n in rows
    ]


def run_twins(seed: int, lags: bool) -> dict[str, int]:
    """Two schedulers live through the same. Returns how often each thing happened."""
    rng = random.Random(seed)
    slots = rng.randint(1, 8)
    settings = {"slots": slots, "blocks": rng.randint(6, 40), "block_size": rng.choice([1, 2, 4, 16])}
    settings |= {"budget": slots + rng.choice([0, 5, 40]), "ring_size": rng.choice([0, 4, 16])}
    twins = [Twin(settings, lags, follows=True), Twin(settings, lags, follows=False)]
    counts = dict.fromkeys(("followed", "left", "begun", "preempted"), 0)
    arrivals, names = 0, []
    for _ in range(400):
        while rng.random() < 0.12:
            arrivals += 1
            names.append(f"r{arrivals}")
            numbers = (rng.randint(1, 12), rng.randint(1, 40), rng.choice([0, 0, 1]), arrivals)
            for twin in twins:
                try:
                    twin.add(names[-1], *numbers)
                except (ContextLengthError, QueueFullError):
                    continue
        if names and rng.random() < 0.05:
            name = rng.choice(names)
            assert len({twin.scheduler.abort(name) is None for twin in twins}) == 1
        batches = [twin.step() for twin in twins]
        assert described(batches[0]) == described(batches[1])
        assert batches[0].num_prefills == batches[1].num_prefills
        advance = batches[0].advance
        if advance is not None:
            counts["followed"] += 1
            counts["left"] += advance.kept is not None
            counts["begun"] += bool(advance.new_block_rows)
    counts["preempted"] = twins[0].scheduler.num_preemptions
    return counts


@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
def test_following_gives_the_batches_that_asking_every_sequence_gives(lags):
    totals: dict[str, int] = {}
    for seed in range(60):
        for name, count in run_twins(seed, lags).items():
            totals[name] = totals.get(name, 0) + count
    assert min(totals.values()) > 100, f"the runs must meet every case to prove anything: {totals}"


def test_rows_are_kept_by_the_list_of_the_batch_before():
    twin = Twin({"slots": 3, "blocks": 40, "block_size": 4, "budget": 40, "ring_size": 0}, False, follows=True)
    for number, (name, tokens) in enumerate({"a": 30, "b": 5, "c": 30}.items()):
        twin.add(name, 3, tokens, 0, number)
    twin.take = lambda each, index: each.output_token_ids.__setitem__(index, 7)
    batches = [twin.step() for _ in range(7)]
    assert [batch.advance is not None for batch in batches] == [False, False, True, True, True, True, True]
    assert all(later.advance.before is earlier.sequences for earlier, later in itertools.pairwise(batches[1:]))
    assert [batch.advance.kept for batch in batches[2:]] == [None, None, None, [0, 2], None]
    twin.scheduler.abort("a")
    assert twin.step().advance.kept == [1]


@pytest.mark.parametrize("max_tokens", [2, 1], ids=["sits out", "awaits its last token"])
def test_no_continuation_while_a_decoding_row_sits_out(max_tokens):
    continuation = Continuation(BlockManager(8, 4), lambda _: True)
    going = sequence(3, output=(7,), max_tokens=9, num_computed_tokens=3, status=Status.RUNNING)
    other = sequence(3, output=(7,), max_tokens=max_tokens, num_computed_tokens=3, status=Status.RUNNING)
    continuation.follow([going], 0, [going, other])
    assert (continuation.advance() is None) == (max_tokens == 2)
