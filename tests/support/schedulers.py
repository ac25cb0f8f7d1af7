"""A scheduler without a model, and what the engine does with it."""

from __future__ import annotations

from leyden.engine.memory.blocks import BlockManager
from leyden.engine.memory.ring import RingRule
from leyden.engine.memory.slots import SlotManager
from leyden.engine.prefix.cache import PrefixCache
from leyden.engine.scheduling.scheduler import Scheduler
from leyden.engine.scheduling.speculation import Speculation
from leyden.engine.scheduling.step import ScheduledBatch
from leyden.engine.sequence import UNSEEN, Sequence, Status


def make_scheduler(
    *,
    blocks=8,
    block_size=4,
    slots=4,
    budget=16,
    mixed=None,
    max_waiting=100,
    ring=RingRule(),
    snapshots=0,
    on_host=0,
    min_tokens=1,
    interval=0,
    speculation=None,
) -> Scheduler:
    """Without snapshots and drafts unless they are asked for; `mixed` None: prompts may fill a step that decodes."""
    manager = BlockManager(blocks, block_size)
    return Scheduler(
        PrefixCache(manager, snapshots, on_host, min_tokens),
        SlotManager(slots),
        snapshot_interval=interval,
        snapshot_every=1,
        max_num_batched_tokens=budget,
        mixed_prefill_tokens=budget if mixed is None else mixed,
        max_waiting=max_waiting,
        ring=ring,
        speculation=speculation or Speculation(0, 1),
    )


Launched = list[tuple[Sequence, int]]  # who gets a token, and which of its answer's it is


def launch(scheduler: Scheduler, batch: ScheduledBatch) -> Launched:
    """What the engine does when a forward pass is under way."""
    rows = [batch.sequences[row] for row in batch.completing_rows]
    launched = [(each, each.num_output_tokens) for each in rows]
    scheduler.update(batch)
    for each, index in launched:
        assert each.output_token_ids[index:] == [UNSEEN]
    for each in batch.sequences:
        assert each.num_computed_tokens <= each.num_tokens
    return launched


def deliver(scheduler: Scheduler, launched: Launched, drawn: dict[str, list[int]] | None = None) -> list[Sequence]:
    """What it does when the tokens have arrived, by request; without them each is a 7. Returns who finished."""
    done = []
    for each, index in launched:
        if each.status is not Status.FINISHED:
            each.output_token_ids[index] = drawn[each.request_id][index] if drawn is not None else 7
            if each.finish_reason(index) is not None:
                del each.output_token_ids[index + 1 :]
                scheduler.complete(each)
                done.append(each)
    return done


def step(scheduler: Scheduler) -> ScheduledBatch:
    batch = scheduler.schedule()
    deliver(scheduler, launch(scheduler, batch))
    scheduler.check_integrity()
    return batch


def rows(batch: ScheduledBatch) -> list[tuple[str, int]]:
    return [(s.request_id, n) for s, n in zip(batch.sequences, batch.num_scheduled_tokens, strict=True)]
