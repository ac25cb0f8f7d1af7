"""A whole forward pass on a GPU: it never waits for the host's eyes, and a CUDA graph can hold it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import BACKENDS
from engines import build_batch, engine_config, sequence
from leyden.engine.execution.runner import ModelRunner
from leyden.engine.scheduling.step import ScheduledBatch
from leyden.engine.startup.build import build
from leyden.models.forward_batch import ForwardBatch
from tiny_models import FULL, LINEAR, random_prompt, save_minimax
from torch import Tensor

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minimax")
    save_minimax(folder, heads=4, layer_types=(LINEAR, FULL, LINEAR), seed=3)
    return folder


@pytest.fixture(params=BACKENDS)
def runner(request, folder) -> ModelRunner:
    settings = {"device": "cuda", "linear_backend": request.param, "num_kv_blocks": 64}
    return build(engine_config(folder, **settings), progress=False).runner


def mixed_batch(runner: ModelRunner) -> ForwardBatch:
    """A prompt, a chunk of another, and two rows that decode."""
    rows = [
        sequence(random_prompt(33, 1), state_slot=2, block_table=[0, 1, 2]),
        sequence(random_prompt(40, 2), state_slot=0, block_table=[3, 4, 5], num_computed_tokens=20),
        sequence(random_prompt(18, 3), state_slot=3, block_table=[6, 7], num_computed_tokens=17),
        sequence(random_prompt(9, 4), state_slot=1, block_table=[8], num_computed_tokens=8, num_pending_tokens=3),
    ]
    return build_batch(ScheduledBatch(rows, [33, 20, 1, 1], 2), runner.tables, runner.pools.block_size)


def logits(runner: ModelRunner, batch: ForwardBatch) -> Tensor:
    return runner.model.compute_logits(runner.model(batch, runner.pools.caches)[batch.logits_indices])


def reset(runner: ModelRunner) -> None:
    """The same content of every pool, whatever ran before."""
    generator = torch.Generator("cuda").manual_seed(0)
    for pool in (*runner.pools.states.tensors, *runner.pools.kv.tensors):
        pool.normal_(generator=generator)


@torch.inference_mode()
def test_it_never_synchronises(runner):
    batch = mixed_batch(runner)
    logits(runner, batch)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits(runner, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_a_graph_holds_it_and_serves_other_tokens(runner):
    batch = mixed_batch(runner)
    other = replace(batch, input_ids=(batch.input_ids + 7) % 200)
    reset(runner)
    expected = logits(runner, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = logits(runner, batch)
    reset(runner)
    batch.input_ids.copy_(other.input_ids)
    graph.replay()
    torch.testing.assert_close(captured, expected)
