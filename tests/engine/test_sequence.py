"""A sequence is its tokens and a few counters; every policy keeps its own facts of it, for as long as it is there."""

from __future__ import annotations

import dataclasses
import random

import pytest
from engines import sequence
from leyden.engine.memory.ring import RingRule
from leyden.engine.scheduling.speculation import Speculation
from leyden.engine.sequence import Sequence
from schedulers import deliver, launch, make_scheduler

MAX_FIELDS = 16


def test_a_sequence_has_few_fields():
    assert len(dataclasses.fields(Sequence)) <= MAX_FIELDS


def held_facts(owner: object, seen: set[int] | None = None) -> set[Sequence]:
    """Sequences that are reached from an object through attributes and containers."""
    seen = set() if seen is None else seen
    if isinstance(owner, Sequence):
        return {owner}
    if id(owner) in seen or isinstance(owner, str | bytes | int | float | type | None):
        return set()
    seen.add(id(owner))
    inside = list(owner) if isinstance(owner, list | tuple | set | frozenset) else []
    if isinstance(owner, dict):
        inside = [*owner.keys(), *owner.values()]
    inside += vars(owner).values() if hasattr(owner, "__dict__") else []
    inside += [getattr(owner, name) for name in getattr(type(owner), "__slots__", ()) if hasattr(owner, name)]
    return set().union(*(held_facts(each, seen) for each in inside))


@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_that_is_gone_leaves_no_fact_behind(seed):
    """However it ended: complete, aborted, refused, out of the queue, after a preemption, as sibling or leader."""
    rng = random.Random(seed)
    scheduler = make_scheduler(
        blocks=14, block_size=4, slots=6, budget=32, snapshots=8, max_waiting=8, ring=RingRule(16),
        speculation=Speculation(3, 4),
    )  # fmt: skip
    alive: dict[str, Sequence] = {}
    for number in range(150):
        prompt = [1, 2, 3] * rng.randint(1, 8) + [rng.randint(1, 4)]
        fields = {"max_tokens": rng.randint(1, 24), "arrival": 2 * number, "prefix_cache": rng.random() < 0.7}
        fields["temperature"] = 0.0
        new = [sequence(prompt, request_id=f"r{number}", num_siblings=1, **fields)]
        new.append(sequence(prompt, request_id=f"s{number}", sibling_of=f"r{number}", **fields))
        for each in new[: rng.randint(1, 2)]:
            if len(scheduler.waiting) < scheduler.max_waiting:
                scheduler.add(each, deadline=number + rng.randint(0, 30))
                alive[each.request_id] = each
        if alive and rng.random() < 0.3:
            scheduler.abort(rng.choice(list(alive)))
        scheduler.expire(number)
        batch = scheduler.schedule()
        if batch.drafts:
            scheduler.update(batch)
            for each in batch.sequences:
                scheduler.verified(each)
                scheduler.speculation.observe(each, 1, 0)
                scheduler.keep_verified(each)
                deliver(scheduler, [(each, each.num_output_tokens - 1)])
        else:
            deliver(scheduler, launch(scheduler, batch))
        scheduler.check_integrity()
        alive = {name: each for name, each in alive.items() if name in scheduler}
    assert scheduler.num_preemptions and scheduler.speculation.num_drafted
    for name in list(alive):
        scheduler.abort(name)
    scheduler.schedule()  # what holds for a single step is gone with the next
    assert held_facts([scheduler]) == set()


def test_a_continuation_holds_no_sequence_that_is_gone():
    scheduler = make_scheduler()
    for name in ("a", "b"):
        scheduler.add(sequence(3, request_id=name, max_tokens=12))
    for _ in range(4):
        deliver(scheduler, launch(scheduler, scheduler.schedule()))
    assert scheduler.schedule().advance is not None
    for name in ("a", "b"):
        scheduler.abort(name)
    scheduler.schedule()
    assert held_facts([scheduler]) == set()
