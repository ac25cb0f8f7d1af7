"""Steps from graphs answer as steps without, whatever their padding. Where there is no GPU a graph is played by
running its step again over the same static tensors."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from backends import BACKENDS, OF_DELTA
from engines import DEVICE, drain, engine_config, make_core, request, use_graphs
from leyden.engine.core import EngineCore
from leyden.engine.execution.arrays import unpack
from leyden.engine.execution.counts import Counts
from leyden.engine.execution.graph_shapes import PREFILL_ROWS, SNAPSHOTS, GraphShape, graph_shapes, shapes_for
from leyden.engine.execution.padding import GraphInputs, row_starts
from leyden.engine.execution.step_input import StepInput
from leyden.engine.scheduling.speculation import can_draft
from qwen_models import NEXT, make_model, save_model
from tiny_models import FULL, LINEAR, random_prompt, save_minimax

DECODES = [GraphShape(2), GraphShape(8)]
MIXED = [GraphShape(0, 16), GraphShape(8, 16), GraphShape(0, 64), GraphShape(8, 64)]


@pytest.fixture(scope="module", params=["lightning"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    if request.param == "lightning":
        save_minimax(folder, heads=4, layer_types=(LINEAR, FULL, LINEAR), seed=3)
    else:
        save_model(folder, make_model(NEXT, num_hidden_layers=3, layer_types=[LINEAR, FULL, LINEAR]))
    return folder


def every_backend(*names: str):
    """Of lightning layers those of these names, or all; and all of gated delta nets."""
    cases = [("lightning", name) for name in names or BACKENDS] + [("gated delta", name) for name in OF_DELTA]
    return pytest.mark.parametrize(("folder", "backend"), cases, indirect=["folder"])


@pytest.fixture(autouse=True)
def _played(played_graphs):
    pass


def plain(folder, **settings) -> EngineCore:
    return make_core(folder, **{"max_num_seqs": 8, "device": DEVICE, "cuda_graphs": False, **settings})


def with_graphs(folder, shapes=DECODES, **settings) -> EngineCore:
    return use_graphs(plain(folder, **settings), shapes)


def composed(core: EngineCore) -> list[StepInput]:
    """Grows by the input of every step that is launched."""
    steps, run = [], core.runner.run
    core.runner.run = lambda step: steps.append(step) or run(step)
    return steps


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
@every_backend()
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
@every_backend("minimax", "replay")
def test_padding_rows_touch_no_slot_and_no_block(folder, backend):
    core = with_graphs(folder, linear_backend=backend)
    runner = core.runner
    core.add_request(request("a", random_prompt(7, 1), max_tokens=12))
    core.step()
    own = core.scheduler.running[0]
    slots = [slot for slot in range(core.plan.num_state_slots) if slot != own.state_slot]
    blocks = [block for block in range(runner.pools.kv.num_blocks) if block not in own.block_table]
    strange = [(pool, slots) for pool in runner.pools.states.tensors]
    strange += [(pool, blocks) for pool in runner.pools.kv.tensors]
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
    answers = drain(with_graphs(folder, shapes=[GraphShape(2)]), *requests)
    assert {n: a.token_ids for n, a in answers.items()} == {n: a.token_ids for n, a in expected.items()}


@torch.inference_mode()
def test_graphs_share_one_place_for_logits(folder):
    graphs = with_graphs(folder).runner.graphs
    places = {results.logits.data_ptr() for _, results in graphs._graphs.values()}
    assert places == {graphs.logits.data_ptr()} and graphs.logits.shape == (8, 320)


@torch.inference_mode()
@pytest.mark.parametrize("lags", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["at once", "a step behind"])
@every_backend()
def test_a_step_with_prompts_answers_as_one_without_graphs(folder, backend, lags):
    settings = {"linear_backend": backend, "async_scheduling": lags, "mixed_prefill_tokens": 24}
    lengths = (1, 70, 5, 64, 23, 40)  # chunks, several prompts in a step, a graph filled to the last token, and one not
    requests = [
        request(name, random_prompt(length, length), max_tokens=12, **PARAMS[name])
        for name, length in zip(PARAMS, lengths, strict=True)
    ]
    expected = drain(plain(folder, **settings), *requests)
    core = with_graphs(folder, MIXED + DECODES, **settings)
    steps = composed(core)
    for _ in range(2):
        answers = drain(core, *requests)
        for name in PARAMS:
            assert answers[name].token_ids == expected[name].token_ids, name
            scores = [[entry.logprob for entry in each[name].logprobs] for each in (answers, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4), name
    assert all(step.shape for step in steps), "every step was to come from a graph"


@torch.inference_mode()
@every_backend()
def test_the_padding_of_prompts_touches_no_slot_and_no_block(folder, backend):
    core = with_graphs(folder, MIXED, linear_backend=backend)
    runner = core.runner
    core.add_request(request("a", random_prompt(7, 1), max_tokens=3))
    batch = core.scheduler.schedule()
    own = batch.sequences[0]
    slots = [slot for slot in range(core.plan.num_state_slots) if slot != own.state_slot]
    blocks = [block for block in range(runner.pools.kv.num_blocks) if block not in own.block_table]
    pools = [(pool, slots) for pool in runner.pools.states.tensors]
    pools += [(pool, blocks) for pool in runner.pools.kv.tensors]
    for pool, others in pools:
        pool[:, others] = 7
    core.launcher.launch(batch).wait()
    for pool, others in pools:
        assert (pool[:, others] == 7).all()


@torch.inference_mode()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("interval", "is_held"), [(5, True), (2, False)], ids=["in the graph", "more than it holds"])
def test_states_on_the_way_of_a_prompt_come_from_a_graph_as_they_come_without(folder, backend, interval, is_held):
    settings = {"linear_backend": backend, "snapshot_min_tokens": 2, "snapshot_interval": interval}
    kept, taken = [], []
    for core in (plain(folder, **settings), with_graphs(folder, MIXED, **settings)):
        steps = composed(core)
        pool = core.runner.pools.snapshots.parts[0].fill_(7)
        drain(core, *(request(str(i), random_prompt(30, i), max_tokens=1) for i in range(2)))
        replayed = [step for step in steps if step.shape is not None and step.shape.num_prefills]
        taken += [int((snapshots_of(step)[:, 2] >= 0).sum()) for step in replayed]
        nodes = [node for node in core.scheduler.cache.tree.nodes if node.snapshot is not None]
        kept.append({(node.end, int(node.tokens[-1])): pool[node.snapshot].clone() for node in nodes})
        free = sorted(set(range(len(pool))) - {node.snapshot for node in nodes})
        assert (pool[free] == 7).all(), "nothing else is written"
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) >= 10
    for place, state in kept[0].items():
        torch.testing.assert_close(kept[1][place], state, rtol=1e-4, atol=1e-4)
    assert any(count > 8 for count in taken) == is_held and all(count <= SNAPSHOTS for count in taken)


@torch.inference_mode()
@every_backend("replay")
def test_states_of_every_kind_of_layer_come_from_a_graph_as_they_come_without(folder, backend):
    settings = {"linear_backend": backend, "max_num_batched_tokens": 64, "snapshot_interval": 64}
    kept = []
    for core in (plain(folder, **settings), with_graphs(folder, MIXED + DECODES, **settings)):
        steps, pool = composed(core), core.runner.pools.snapshots
        drain(core, *(request(str(i), random_prompt(200, i), max_tokens=1) for i in range(2)))
        nodes = [node for node in core.scheduler.cache.tree.nodes if node.snapshot is not None]
        kept.append({(node.end, int(node.tokens[-1])): read(pool[node.snapshot], node.end) for node in nodes})
    assert all(step.shape for step in steps), "every step was to come from a graph"
    assert kept[0].keys() == kept[1].keys() and {end for end, _ in kept[0]} >= {64, 128, 192}
    for place, parts in kept[0].items():
        torch.testing.assert_close(kept[1][place], parts, rtol=1e-4, atol=1e-4)


def read(parts: list[torch.Tensor], num_tokens: int) -> list[torch.Tensor]:
    """A snapshot without the place of a tail that is the next token's: what it holds is never read."""
    found = [part.clone() for part in parts]
    for tail in found[1::2]:
        tail[:, num_tokens % 4] = 0
    return found


def snapshots_of(step: StepInput) -> np.ndarray:
    """[S, 3], of a step from a graph."""
    return unpack(GraphInputs(()).padding(step.shape).arrays, step.padded)["snapshots"].reshape(-1, 3)


@torch.inference_mode()
def test_a_prompt_that_is_scored_runs_without_a_graph(folder):
    asked = request("a", random_prompt(9, 1), max_tokens=3, prompt_logprobs=2)
    expected = drain(plain(folder), asked)
    answers = drain(with_graphs(folder, MIXED + DECODES), asked)
    assert answers["a"].token_ids == expected["a"].token_ids
    assert len(answers["a"].prompt_logprobs) == len(expected["a"].prompt_logprobs) > 0


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64, 65, 256, 300, 512])
def test_sizes_grow_to_the_most_rows_and_padding_stays_small(most):
    shapes = graph_shapes(most, 0)
    sizes = [shape.num_decodes for shape in shapes]
    assert shapes == [GraphShape(size) for size in sizes]
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for rows in range(1, most + 1):
        padding = next(size for size in sizes if size >= rows) - rows
        assert padding < (8 if rows <= 64 else 16 if rows <= 256 else 32)


@pytest.mark.parametrize("most", [1, 8, 65, 272])
@pytest.mark.parametrize("tokens", [1, 63, 65, 512, 4096])
def test_shapes_with_prompts_grow_and_waste_little(most, tokens):
    shapes = graph_shapes(most, max_tokens=tokens)
    assert shapes == sorted(shapes, key=lambda shape: shape.num_tokens) and len(set(shapes)) == len(shapes)
    room = max(shape.num_prefill_tokens for shape in shapes)
    assert room == (0 if tokens < 64 else min(1 << tokens.bit_length() - 1, 2048))
    for num_decodes in range(most + 1):
        for num_tokens in {1, 64, 65, 300, 512, 513, 1025, 2048} & set(range(room + 1)):
            counts = Counts(1, num_tokens, num_decodes, max_query_len=num_tokens)
            shape = next((shape for shape in shapes if shape.holds(counts)), None)
            if num_tokens > 512 and num_decodes:
                assert shape is None
            else:
                most_tokens = 2 * num_tokens if num_tokens <= 512 else num_tokens * 5 / 4
                assert shape.num_tokens <= max(64, most_tokens) + num_decodes + 64


@pytest.mark.parametrize(
    "counts",
    [(PREFILL_ROWS, 40, 2), (1, 65, 2), (1, 40, 9), (0, 0, 2)],
    ids=["rows", "tokens", "decodes", "no prompt"],
)
def test_counts_that_a_shape_does_not_hold(counts):
    shape = GraphShape(8, 64)
    assert shape.holds(Counts(PREFILL_ROWS - 1, 64, 8, max_query_len=64))
    assert not shape.holds(Counts(*counts, max_query_len=counts[1] or 1))


@torch.inference_mode()
@pytest.mark.parametrize("lags", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["at once", "a step behind"])
@every_backend("minimax", "replay")
@pytest.mark.parametrize("max_tokens", [3, 9, 64])
def test_drafts_from_graphs_answer_as_a_text_without_drafts(folder, backend, max_tokens, lags):
    settings = {"linear_backend": backend, "async_scheduling": lags, "max_num_batched_tokens": max_tokens}
    names = ["greedy", "drawn", "penalised"]
    requests = [request(n, random_prompt(4, i) * 4, max_tokens=40, **PARAMS[n]) for i, n in enumerate(names)]
    settings["max_num_seqs"] = 3
    expected = drain(plain(folder, **settings), *requests)
    settings |= {"speculative_tokens": 7, "speculative_max_rows": 3}
    shapes = shapes_for(engine_config(folder, **settings), 3)
    core = with_graphs(folder, shapes, **settings)
    rng = random.Random(0)
    propose(core, lambda known: [t if rng.random() < 0.8 else t + 1 for t in known], expected)
    steps = composed(core)
    answers = drain(core, *requests)
    assert {n: a.token_ids for n, a in answers.items()} == {n: a.token_ids for n, a in expected.items()}
    assert core.stats().accepted_tokens_total > 0
    assert any(step.shape and step.shape.num_verifies for step in steps)


def propose(core: EngineCore, change, answers) -> None:
    """Let those draft who may: what their answers will be, changed."""

    def proposal(row, count):
        known = row.num_output_tokens - row.ends_in_unseen
        return (
            change(answers[row.request_id].token_ids[known : known + max(count, 0)])
            if can_draft(row.sampling_params)
            else []
        )

    core.scheduler.speculation._propose = proposal


@pytest.mark.parametrize("num_slots", [1, 3, 8, 64])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 9, 64, 2048])
@pytest.mark.parametrize("bound", ["speculative_max_rows", "max_graph_rows"])
def test_every_step_with_drafts_has_a_shape_and_every_shape_can_be_met(num_slots, max_tokens, bound):
    num_slots = min(num_slots, max_tokens)
    settings = {"max_num_seqs": num_slots, "max_num_batched_tokens": max_tokens, bound: 5}
    shapes = shapes_for(engine_config("x", speculative_tokens=7, **settings), num_slots)
    assert len(set(shapes)) == len(shapes) and shapes == sorted(shapes, key=lambda shape: shape.num_tokens)
    most = max((shape.num_verifies for shape in shapes), default=0)
    assert most == min(num_slots, 5, max_tokens - 1)
    for rows in range(1, most + 1):
        tokens = min(8 * rows, max_tokens)
        counts = Counts(rows, tokens, 0, max_query_len=8, num_drafted=rows, num_drafted_tokens=tokens)
        assert next(shape for shape in shapes if shape.holds(counts)).num_verifies < 2 * rows
    assert not any(shape.num_verifies for shape in shapes_for(engine_config("x", **settings), num_slots))


def test_drafts_have_shapes_of_their_own():
    shape = GraphShape.of_drafts(2)
    fitting = Counts(2, 11, 0, max_query_len=8, num_drafted=2, num_drafted_tokens=11)
    assert shape.holds(fitting) and not GraphShape(8, 64).holds(fitting)
    for wrong in ({"num_drafted": 3, "num_prefills": 3}, {"max_query_len": 9}, {"num_drafted": 0}):
        assert not shape.holds(dataclasses.replace(fitting, **wrong))
    starts = row_starts(np.array([0, 3, 11]), shape)
    assert starts.tolist() == [0, 3, 11, 16, 16]
    assert row_starts(np.array([0, 1]), shape).tolist() == [0, 1, 9, 16, 16]
