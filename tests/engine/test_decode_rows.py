"""The inputs of decode steps that follow from the one before, and the host memory that they share."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from engines import DEVICE, drain, make_core, request
from leyden.engine.batch import unpack
from leyden.engine.core import EngineCore
from leyden.engine.cuda_graph import StepGraphs, graph_shapes
from leyden.engine.decode_rows import FIELDS, STEPS_AHEAD, DecodeRows
from leyden.engine.sequence import UNSEEN
from leyden.engine.staging import StagedTokens, StagingPool
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
    core.runner.graphs = StepGraphs(core.runner._compute, graph_shapes(8, 0), 64, core.runner.device)
    return core


def watch(core: EngineCore) -> dict[str, int]:
    """Hold every step's inputs against those that are made anew. Returns how often each thing happened."""
    runner, graphs = core.runner, core.runner.graphs
    counts = dict.fromkeys(("followed", "left", "turned"), 0)
    scheduled, decode = [], runner._decode
    make = runner._decode_rows

    def note(batch):
        scheduled[:] = [batch]
        return make(batch)

    def check(rows):
        batch = scheduled[0]
        anew = DecodeRows(graphs, batch, runner.sampler.rows(batch.sequences), runner.block_size, runner.ring_size)
        assert (rows.shape, rows.sequences, rows.indices) == (anew.shape, anew.sequences, anew.indices)
        found, expected = (unpack(graphs.padding[rows.shape].arrays, each.packed) for each in (rows, anew))
        for each in (found, expected):
            each["uniform"][each["temperature"] == 0] = 0  # a greedy row looks at none
        for name in set(FIELDS) - {"input_ids"}:
            assert found[name].tolist() == expected[name].tolist(), name
        known = expected["input_ids"] != UNSEEN
        last = runner.sampler.last_tokens.cpu().numpy()[found["state_indices"]]
        ids = np.where(found["input_ids"] == UNSEEN, last, found["input_ids"])
        assert ids[known].tolist() == expected["input_ids"][known].tolist()
        counts["followed"] += batch.advance is not None
        counts["left"] += batch.advance is not None and batch.advance.kept is not None
        counts["turned"] += batch.advance is not None and rows.table is None and rows.has_turned
        step = decode(rows)
        table = graphs.block_table.cpu().numpy()
        for row, own in enumerate(batch.sequences):
            assert table[row, : len(own.block_table)].tolist() == own.block_table.tolist()
        return step

    runner._decode_rows, runner._decode = note, check
    return counts


@torch.inference_mode()
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize("backend", ["minimax", "replay"])
def test_inputs_that_follow_are_those_made_anew(folder, backend, lags):
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
def test_what_a_step_reads_and_writes_is_touched_by_no_later_step_until_it_is_read(folder):
    core = with_graphs(folder)
    core.add_request(request("a", random_prompt(5, 1), max_tokens=100))
    core.step()
    runner, scheduler = core.runner, core.scheduler
    launched, memory = [], []
    for _ in range(3):
        batch = scheduler.schedule()
        launched.append(runner.launch(batch))
        scheduler.update(batch)
        staging = launched[-1].sampled._staging
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


def test_tokens_are_read_once():
    pool = StagingPool(16, 2, torch.device(DEVICE))
    staged = StagedTokens(pool, pool.take(), 2)
    staged.wait()
    with pytest.raises(AssertionError, match="read before"):
        staged.wait()
