"""A runner needs nothing but a step's input: the input can be sent, and another runner computes the same tokens."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import DEVICE, drain, make_core, request, use_graphs
from leyden.engine.core import EngineCore
from leyden.engine.execution.graph_shapes import shapes_for
from leyden.engine.execution.step_input import StepInput
from tiny_models import FULL, LINEAR, random_prompt, save_minimax

PARAMS = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 0.7, "repetition_penalty": 1.3, "seed": 7},
    {"logit_bias": {3: 4.0}, "min_tokens": 4, "logprobs": 3},
    {"prompt_logprobs": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minimax")
    save_minimax(folder, heads=2, layer_types=(LINEAR, FULL), seed=3)
    return folder


@pytest.fixture(autouse=True)
def _played(played_graphs):
    pass


def make(folder, *, graphs: bool, **settings) -> EngineCore:
    settings |= {"device": DEVICE, "cuda_graphs": False, "block_size": 4, "max_model_len": 128, "max_num_seqs": 5}
    core = make_core(folder, **settings)
    return use_graphs(core, shapes_for(core.config, core.plan.num_state_slots)) if graphs else core


def leaves(value: object) -> Iterator[object]:
    """All that a step's input is made of."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from leaves([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    else:
        yield value


@torch.inference_mode()
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    "settings", [{}, {"speculative_tokens": 3}, {"snapshots": 8}], ids=["plain", "drafts", "cache"]
)
def test_steps_sent_as_bytes_give_the_same_tokens_on_another_runner(folder, graphs, settings):
    """With the pools of the other runner poisoned: it reads nothing that no step has told it to write."""
    core, other = make(folder, graphs=graphs, **settings), make(folder, graphs=graphs, **settings)
    for pool in (*other.runner.pools.states.tensors, *other.runner.pools.kv.tensors):
        pool.fill_(float("nan"))
    run, kinds = core.runner.run, set()

    def run_both(step: StepInput):
        assert {type(leaf) for leaf in leaves(step)} <= {np.ndarray, int, bool, str, type(None)}
        kinds.add((step.shape is not None, step.is_decode))
        sent = pickle.dumps(step)
        here, there = run(step), other.runner.run(pickle.loads(sent))
        assert here.scores == there.scores
        answers = here.sampled.wait(), there.sampled.wait()
        assert answers[0] == answers[1]
        return here._replace(sampled=SimpleNamespace(wait=lambda: answers[0]))

    core.runner.run = run_both
    rng = random.Random(1)
    for number in range(12):
        prompt = (random_prompt(12, 0) if rng.random() < 0.5 else []) + random_prompt(rng.randint(1, 20), number)
        core.add_request(request(f"r{number}", prompt, max_tokens=12, **PARAMS[number % len(PARAMS)]))
        for _ in range(rng.choice([1, 4])):
            core.step()
    drain(core)
    assert kinds == ({(False, False), (True, False), (True, True)} if graphs else {(False, False)})
