"""Decode steps from graphs answer as steps without, whatever their padding. Where there is no GPU a graph is played by
running its step again over the same static tensors."""

from __future__ import annotations

import pytest
import torch
from engines import drain, make_core, request
from leyden.engine import cuda_graph
from leyden.engine.core import EngineCore
from leyden.engine.cuda_graph import DecodeGraphs, graph_sizes
from tiny_models import FULL, LINEAR, random_prompt, save_minimax

SIZES = [2, 8]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minimax")
    save_minimax(folder, heads=4, layer_types=(LINEAR, FULL, LINEAR), seed=3)
    return folder


@pytest.fixture(autouse=True)
def _played(monkeypatch):
    def record(function, pool):
        results = function()

        def replay() -> None:
            for result, now in zip(results, function(), strict=True):
                result.copy_(now)

        return torch.inference_mode()(replay), results

    if DEVICE == "cpu":
        monkeypatch.setattr(cuda_graph, "record", record)


def plain(folder, **settings) -> EngineCore:
    return make_core(folder, max_num_seqs=8, device=DEVICE, cuda_graphs=False, **settings)


def with_graphs(folder, sizes=SIZES, **settings) -> EngineCore:
    core = plain(folder, **settings)
    core.runner.graphs = DecodeGraphs(core.runner._decode, sizes, 16, core.runner.device)
    return core


PARAMS = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "top_p": 0.8, "seed": 5},
    "top_k": {"temperature": 1.2, "top_k": 7, "min_p": 0.01, "seed": 6},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "seed": 7},
    "biased": {"logit_bias": {3: 4.0}, "min_tokens": 4},
    "with logprobs": {"logprobs": 3},
}


@torch.inference_mode()
@pytest.mark.parametrize("lags", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["at once", "a step behind"])
@pytest.mark.parametrize("backend", ["minimax", "seg_la", "replay"])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 6])
def test_a_padded_step_answers_as_one_without_graphs(folder, backend, num_rows, lags):
    settings = {"linear_backend": backend, "async_scheduling": lags}
    names = list(PARAMS)[:num_rows]
    requests = [request(n, random_prompt(5 + i, i), max_tokens=20, **PARAMS[n]) for i, n in enumerate(names)]
    expected = drain(plain(folder, **settings), *requests)
    core = with_graphs(folder, **settings)
    for _ in range(2):  # the second time every slot has had another owner
        answers = drain(core, *requests)
        for name in names:
            assert answers[name].token_ids == expected[name].token_ids, name
            scores = [[entry.logprob for entry in each[name].logprobs] for each in (answers, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4), name


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["minimax", "replay"])
def test_padding_rows_touch_no_slot_and_no_block(folder, backend):
    core = with_graphs(folder, linear_backend=backend)
    runner = core.runner
    core.add_request(request("a", random_prompt(7, 1), max_tokens=12))
    core.step()
    own = core.scheduler.running[0]
    slots = [slot for slot in range(runner.plan.num_state_slots) if slot != own.state_slot]
    blocks = [block for block in range(runner.kv.num_blocks) if block not in own.block_table]
    strange = [(pool, slots) for pool in (runner.states.state, runner.states.key_ring, runner.states.value_ring)]
    strange += [(runner.kv.key, blocks), (runner.kv.value, blocks)]
    for pool, others in strange:
        pool[:, others] = 7
    for _ in range(5):
        core.step()
    for pool, others in strange:
        assert (pool[:, others] == 7).all()


@torch.inference_mode()
def test_more_rows_than_the_largest_graph_run_without_one(folder):
    requests = [request(str(i), random_prompt(6, i), max_tokens=6) for i in range(4)]
    expected = drain(plain(folder), *requests)
    answers = drain(with_graphs(folder, sizes=[2]), *requests)
    assert {n: a.token_ids for n, a in answers.items()} == {n: a.token_ids for n, a in expected.items()}


@torch.inference_mode()
def test_graphs_share_one_place_for_logits(folder):
    graphs = with_graphs(folder).runner.graphs
    places = {results.logits.data_ptr() for _, results in graphs._graphs.values()}
    assert places == {graphs.logits.data_ptr()} and graphs.logits.shape == (SIZES[-1], 320)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64, 65, 256, 300, 512])
def test_sizes_grow_to_the_most_rows_and_padding_stays_small(most):
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for rows in range(1, most + 1):
        padding = next(size for size in sizes if size >= rows) - rows
        assert padding < (8 if rows <= 64 else 16 if rows <= 256 else 32)
