"""`linear_backend: fla`: where it is refused, and an engine that computes by a stand-in for the package."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from engines import answer, call_session, drain, engine_config, make_core, request
from fla_stand_in import stand_in
from leyden.engine.errors import ConfigError
from leyden.engine.execution.graph_shapes import shapes_for
from leyden.engine.startup import model as startup_model
from leyden.engine.startup.device import check_linear_backend
from leyden.engine.startup.model import place_model
from leyden.kernels.delta import fla
from qwen_models import DENSE, make_model, save_model
from tiny_models import greedy, random_prompt

PROMPT = random_prompt(150, 1)


@pytest.fixture(scope="module")
def theirs():
    return make_model(DENSE)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    save_model(folder, theirs)
    return folder


@pytest.fixture
def stood_in(monkeypatch):
    monkeypatch.setattr(startup_model, "check_linear_backend", lambda name, device: None)
    monkeypatch.setattr(fla, "load", stand_in)


@torch.inference_mode()
@pytest.mark.parametrize("max_tokens", [64, 256])
def test_texts_are_those_of_transformers_in_mixed_steps_and_from_the_prefix_cache(stood_in, folder, theirs, max_tokens):
    settings = {"max_num_batched_tokens": max_tokens, "snapshots": 8, "snapshot_min_tokens": 16}
    core = make_core(folder, linear_backend="fla", **settings)
    prompts = {"a": PROMPT, "b": [5], "c": random_prompt(66, 2), "d": [*PROMPT[:130], 7, 8, 9]}
    answers = drain(core, *(request(name, prompts[name], max_tokens=12) for name in "abc"))
    answers |= drain(core, request("d", prompts["d"], max_tokens=12))
    assert answers["d"].num_cached_tokens >= 64
    for name, prompt in prompts.items():
        assert answers[name].token_ids == greedy(theirs, prompt, 12), name
    assert core.info.linear_backend == "fla"


@torch.inference_mode()
def test_a_session_of_another_backend_goes_on_by_fla(stood_in, folder, theirs, tmp_path):
    settings = {"session_folder": tmp_path, "snapshots": 8}
    first = make_core(folder, linear_backend="replay", **settings)
    drain(first, request("a", PROMPT, max_tokens=9, session_id="s"))
    call_session(first, "save", "s")
    second = make_core(folder, linear_backend="fla", **settings)
    call_session(second, "restore", "s")
    more = [*PROMPT, *greedy(theirs, PROMPT, 9), 3, 4]
    found = drain(second, request("b", more, max_tokens=9, session_id="s"))["b"]
    assert found.num_cached_tokens > len(PROMPT) and found.token_ids == greedy(theirs, more, 9)


def test_it_is_refused_on_a_cpu_without_its_package_and_beside_drafts(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"^linear_backend = fla: .* need a GPU, and the device is cpu; take chunk"):
        make_core(folder, linear_backend="fla")
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ConfigError, match=r"^linear_backend = fla: fla-core cannot be used .*pip install 'leyden\[fla"):
        check_linear_backend("fla", torch.device("cuda"))
    check_linear_backend("replay", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"^speculative_tokens = 3: linear_backend fla keeps 0 tokens"):
        make_core(folder, linear_backend="fla", speculative_tokens=3)


def test_a_forecast_needs_neither_package_nor_gpu_and_knows_no_ring(folder):
    served = place_model(engine_config(folder, linear_backend="fla"), on_meta=True)
    assert (served.linear_backend, served.ring.capacity, served.prompts_in_graphs) == ("fla", 0, False)
    assert place_model(engine_config(folder), on_meta=True).prompts_in_graphs


def test_graphs_hold_decode_rows_alone_where_prompts_wait_for_the_device():
    config = engine_config("x", max_num_seqs=64, max_num_batched_tokens=2048)
    with_prompts = shapes_for(config, 64)
    assert shapes_for(config, 64, prompts=False) == [shape for shape in with_prompts if not shape.num_prefill_tokens]


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla-core")
@pytest.mark.filterwarnings("ignore")  # of the package's own, on import
@torch.inference_mode()
def test_the_package_itself_serves_beside_graphs_and_without(folder):
    answers = []
    for cuda_graphs in (True, False):
        settings = {"device": "cuda", "memory_fraction": 0.2, "cuda_graphs": cuda_graphs, "max_num_batched_tokens": 256}
        core = make_core(folder, linear_backend="fla", **settings)
        assert answer(core, [5], max_tokens=20).token_ids
        answers.append(answer(core, PROMPT, max_tokens=20).token_ids)
    assert answers[0] == answers[1] and len(answers[0]) == 20
