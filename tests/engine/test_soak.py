"""A day's worth of short requests through the engine, with a runner that draws tokens instead of computing them."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from engines import assert_nothing_held, request
from leyden.configs.schema import EngineConfig
from leyden.engine import core as core_module
from leyden.engine.core import EngineCore
from leyden.engine.errors import ContextLengthError, QueueFullError
from leyden.engine.memory.plan import MemoryPlan
from leyden.engine.memory.ring import RingRule
from leyden.engine.messages import MemoryUse
from leyden.engine.scheduling.step import ScheduledBatch
from leyden.engine.startup.build import Built

VOCAB, EOS = 100, 0
ABORT_RATE, BAD_LOGITS_RATE = 0.02, 0.001
CHECK_EVERY = 100  # steps


class FakeStep:
    """Tokens that were drawn when the step was launched."""

    prompt_logprobs = {}  # noqa: RUF012 - none, ever
    sink = drafts = None

    def __init__(self, batch: ScheduledBatch, rng: random.Random) -> None:
        self.sequences = rows = [batch.sequences[row] for row in batch.completing_rows]
        self.indices = [len(sequence.output_token_ids) for sequence in rows]
        self.tokens = [-1 if rng.random() < BAD_LOGITS_RATE else rng.randrange(VOCAB) for _ in rows]

    def wait(self):
        return self.tokens, [None] * len(self.tokens)


class FakeRunner:
    """No model."""

    device = torch.device("cpu")
    served = SimpleNamespace(
        ring=RingRule(16, replays=True),
        snapshot_every=1,
        spec=SimpleNamespace(vocab_size=VOCAB, eos_token_ids=(EOS,)),
    )


class FakeLauncher:
    """Draws tokens at random."""

    def __init__(self, runner: FakeRunner) -> None:
        self.rng = random.Random(1)

    def launch(self, batch: ScheduledBatch) -> FakeStep:
        return FakeStep(batch, self.rng)


def build(config: EngineConfig, *, progress: bool) -> Built:
    plan = MemoryPlan(num_state_slots=config.max_num_seqs, num_kv_blocks=60, max_model_len=64)
    return Built(FakeRunner(), plan, MemoryUse(total=0))


def soak(core: EngineCore, num_requests: int, rng: random.Random) -> dict[str, int]:
    """Keep the queue filled. Returns how often each thing happened."""
    counts = dict.fromkeys(("stop", "length", "error", "aborted", "refused"), 0)
    alive: dict[str, None] = {}
    num_sent = num_steps = 0
    while num_sent < num_requests or core.has_work:
        while num_sent < num_requests and rng.random() < 0.5:
            num_sent += 1
            name, prompt = f"r{num_sent}", [rng.randrange(VOCAB)] * rng.choice([1, 1, 2, 5, 17, 40])
            try:
                core.add_request(request(name, prompt, max_tokens=rng.randint(0, 30), eos=[EOS]))
                alive[name] = None
            except (QueueFullError, ContextLengthError):
                counts["refused"] += 1
        if alive and rng.random() < ABORT_RATE:
            name = next(iter(alive))
            del alive[name]
            core.abort_request(name)
            counts["aborted"] += 1
        for output in core.step():
            if output.finish_reason is not None:
                counts[output.finish_reason] += 1
                del alive[output.request_id]
        num_steps += 1
        if num_steps % CHECK_EVERY == 0:
            core.check_integrity()
    assert not alive, "somebody never got an end"
    assert sum(counts.values()) == num_requests
    return counts


@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
def test_a_soak_of_short_requests_ends_with_every_slot_and_block_free(monkeypatch, lags):
    monkeypatch.setattr(core_module, "build", build)
    monkeypatch.setattr(core_module, "Launcher", FakeLauncher)
    monkeypatch.setattr(core_module, "engine_info", lambda config, built: None)
    config = EngineConfig(
        max_num_seqs=12, max_num_batched_tokens=40, block_size=4, max_waiting=50, async_scheduling=lags
    )
    core = EngineCore(config, progress=False)
    counts = soak(core, 100_000, random.Random(2))
    assert min(counts.values()) > 0, f"the soak must meet every case to prove anything: {counts}"
    assert core.stats().preemptions_total > 0
    assert_nothing_held(core)
