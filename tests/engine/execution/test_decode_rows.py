"""The inputs of decode steps that follow from the one before, and the host memory that they share."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from engines import DEVICE, drain, make_core, request, sequence, use_graphs
from leyden.engine.core import EngineCore
from leyden.engine.execution.arrays import unpack
from leyden.engine.execution.decode_rows import STEPS_AHEAD, DecodeRows, TokenSink
from leyden.engine.execution.graph_shapes import graph_shapes
from leyden.engine.execution.padding import DECODE_FIELDS, GraphInputs
from leyden.engine.execution.staging import StagedTokens, StagingPool
from leyden.engine.sequence import UNSEEN
from tiny_models import FULL, LINEAR, random_prompt, save_minimax


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minimax")
    save_minimax(folder, heads=4, layer_types=(LINEAR, FULL, LINEAR), seed=3)
    return folder


@pytest.fixture(autouse=True)
def _played(played_graphs):
    pass


def with_graphs(folder, **settings) -> EngineCore:
    core = make_core(folder, max_num_seqs=8, device=DEVICE, cuda_graphs=False, block_size=4, **settings)
    return use_graphs(core, graph_shapes(8, 0))


def watch(core: EngineCore) -> dict[str, int]:
    """Hold the input of every decode step against one that is made anew. Returns how often each thing happened."""
    runner, composer = core.runner, core.launcher.composer
    inputs, compose = GraphInputs(runner.graphs.shapes), composer.compose
    counts = dict.fromkeys(("followed", "left", "begun"), 0)

    def checked(batch):
        step, receivers = compose(batch)
        if not step.is_decode:
            return step, receivers
        ring, size = runner.served.ring, runner.pools.block_size
        anew = DecodeRows(inputs, None, batch, composer.sampling_rows(batch.sequences), size, ring)
        assert (step.shape, receivers.sequences, receivers.indices) == (anew.shape, batch.sequences, anew.indices)
        found, expected = (unpack(inputs.padding(step.shape).arrays, packed) for packed in (step.padded, anew.packed))
        for each in (found, expected):
            each["uniform"][each["temperature"] == 0] = 0  # a greedy row looks at none
        for name in set(DECODE_FIELDS) - {"input_ids"}:
            assert found[name].tolist() == expected[name].tolist(), name
        known = expected["input_ids"] != UNSEEN
        last = runner.sampler.last_tokens.cpu().numpy()[found["state_indices"]]
        ids = np.where(found["input_ids"] == UNSEEN, last, found["input_ids"])
        assert ids[known].tolist() == expected["input_ids"][known].tolist()
        counts["followed"] += batch.advance is not None
        counts["left"] += batch.advance is not None and batch.advance.kept is not None
        counts["begun"] += batch.advance is not None and step.brings_cells
        return step, receivers

    composer.compose = checked
    return counts


@torch.inference_mode()
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize("backend", ["minimax", "replay"])
def test_inputs_of_a_continuation_equal_inputs_made_anew(folder, backend, lags):
    core = with_graphs(folder, linear_backend=backend, async_scheduling=lags, max_model_len=128)
    counts = watch(core)
    rng = random.Random(4)
    for number in range(60):
        if core.scheduler.running and rng.random() < 0.2:
            core.abort_request(rng.choice(core.scheduler.running).request_id)
        params = {"temperature": rng.choice([0.0, 0.9]), "seed": number}
        core.add_request(request(f"r{number}", random_prompt(rng.randint(1, 9), number), max_tokens=60, **params))
        for _ in range(rng.choice([1, 3, STEPS_AHEAD, 2 * STEPS_AHEAD])):
            core.step()
            core.check_integrity()
    drain(core)
    assert min(counts.values()) > 20, f"the run must meet every case to prove anything: {counts}"


@torch.inference_mode()
def test_buffers_of_a_step_stay_untouched_until_they_are_read(folder):
    core = with_graphs(folder)
    core.add_request(request("a", random_prompt(5, 1), max_tokens=100))
    core.step()
    launcher, scheduler = core.launcher, core.scheduler
    for _ in range(2):  # the second time with what the first has given back
        launched, memory = [], []
        for _ in range(3):
            batch = scheduler.schedule()
            launched.append(launcher.launch(batch))
            scheduler.update(batch)
            staging = launched[-1].sampled._staging
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            memory.append((staging, staging.array.copy(), staging.tokens.clone()))
        assert len({id(staging) for staging, _, _ in memory}) == 3
        for step, (staging, inputs, tokens) in zip(launched, memory, strict=True):
            assert (staging.array == inputs).all()
            assert step.wait()[0] == tokens.tolist()


@torch.inference_mode()
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
def test_host_memory_is_made_once_for_each_step_in_flight(folder, monkeypatch, lags):
    made = []
    start = StagingPool.take

    def take(pool):
        staging = start(pool)
        made.append(staging)
        return staging

    monkeypatch.setattr(StagingPool, "take", take)
    core = with_graphs(folder, async_scheduling=lags)
    drain(core, request("a", random_prompt(5, 1), max_tokens=30))
    assert len(made) == 29 and len({id(staging) for staging in made}) == 1 + lags
    assert all(staging.inputs.is_pinned() == (DEVICE == "cuda") for staging in made)


@torch.inference_mode()
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
def test_a_stop_token_ends_its_own_row(folder, lags):
    core = with_graphs(folder, async_scheduling=lags)
    prompts = {name: random_prompt(5, seed) for seed, name in enumerate("abc")}
    whole = drain(
        core, *(request(name, prompt, max_tokens=30, temperature=1.0, seed=1) for name, prompt in prompts.items())
    )
    stop = whole["b"].token_ids[9]
    answers = drain(
        core,
        *(
            request(name, prompt, max_tokens=30, temperature=1.0, seed=1, eos=[stop])
            for name, prompt in prompts.items()
        ),
    )
    for name, answer in answers.items():
        expected = whole[name].token_ids
        assert answer.token_ids == (expected[: expected.index(stop) + 1] if stop in expected else expected)


@torch.inference_mode()
def test_request_aborted_during_a_step_gets_no_token_of_it(folder):
    core = with_graphs(folder, async_scheduling=True)
    for name in "abc":
        core.add_request(request(name, random_prompt(5, 1), max_tokens=50))
    for _ in range(6):
        outputs = core.step()
    assert [output.request_id for output in outputs] == ["a", "b", "c"]
    core.abort_request("b")
    assert [output.request_id for output in core.step()] == ["a", "c"]


def test_tokens_that_are_bad_or_may_be_the_last_are_left_to_a_closer_look():
    rows = [
        sequence([1, 2], output=(3, UNSEEN), max_tokens=5),
        sequence([1], output=(4, 5, UNSEEN), max_tokens=8, eos_token_ids=[9]),
    ]
    sink = TokenSink(rows)
    assert sink.take([1, 2], [7, 9]) is sink.take([1, 2], [-1, 7]) is None
    assert [row.output_token_ids[-1] for row in rows] == [UNSEEN, UNSEEN]
    assert [output.token_ids for output in sink.take([1, 2], [7, 8])] == [[7], [8]]
    assert [row.output_token_ids for row in rows] == [[3, 7], [4, 5, 8]]


def test_tokens_are_read_once():
    pool = StagingPool(16, 2, torch.device(DEVICE))
    staged = StagedTokens(pool, pool.take(), 2)
    staged.wait()
    with pytest.raises(AssertionError, match="read before"):
        staged.wait()
