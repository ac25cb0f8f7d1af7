"""The device knows the blocks of every row of a step, and a step sends only those that it does not know."""

from __future__ import annotations

import random

import pytest
import torch
from engines import DEVICE, drain, make_core, request, sequence, use_graphs
from leyden.engine.core import EngineCore
from leyden.engine.execution import runner as model_runner
from leyden.engine.execution.arrays import packed_size
from leyden.engine.execution.block_tables import SentBlocks
from leyden.engine.execution.graph_shapes import shapes_for
from leyden.engine.execution.step_input import batch_arrays
from leyden.engine.scheduling.speculation import can_draft
from leyden.engine.scheduling.step import ScheduledBatch
from leyden.engine.sequence import Sequence
from tiny_models import FULL, LINEAR, random_prompt, save_minimax

every_path = pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minimax")
    save_minimax(folder, heads=2, layer_types=(LINEAR, FULL), seed=3)
    return folder


@pytest.fixture(autouse=True)
def _played(played_graphs):
    pass


def make(folder, *, graphs: bool, **settings) -> EngineCore:
    core = make_core(folder, device=DEVICE, cuda_graphs=False, **settings)
    return use_graphs(core, shapes_for(core.config, core.plan.num_state_slots)) if graphs else core


def watch(core: EngineCore) -> dict[str, int]:
    """Hold the device's tables against the rows of every step. Returns how often each kind of step came."""
    launcher, launch, tables = core.launcher, core.launcher.launch, core.runner.tables
    counts = dict.fromkeys(("prompts", "decodes", "drafts", "followed"), 0)

    def checked(batch: ScheduledBatch):
        step = launch(batch)
        table = tables.table.cpu().numpy()
        for row in batch.sequences:
            assert table[row.state_slot, : len(row.block_table)].tolist() == row.block_table.tolist()
        counts["prompts"] += batch.num_prefills > batch.num_drafted
        counts["decodes"] += batch.num_decodes > 0
        counts["drafts"] += batch.num_drafted > 0
        counts["followed"] += batch.advance is not None
        return step

    launcher.launch = checked
    return counts


@torch.inference_mode()
@every_path
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
def test_the_device_knows_the_blocks_of_every_row(folder, graphs, lags):
    """Through preemptions, aborts, siblings, cached prefixes and drafts, each slot with many owners."""
    settings = {"block_size": 4, "num_kv_blocks": 34, "max_model_len": 128, "speculative_tokens": 3}
    settings |= {"snapshots": 8, "snapshot_min_tokens": 8, "cpu_memory_gb": 0.1}
    core = make(folder, graphs=graphs, async_scheduling=lags, speculative_max_rows=2, **settings)
    propose, rng = core.scheduler.speculation._propose, random.Random(7)
    core.scheduler.speculation._propose = lambda row, count: (
        propose(row, count) or [5] * (count if can_draft(row.sampling_params) else 0)
    )
    counts = watch(core)
    beginning = random_prompt(24, 0)
    for number in range(28):
        prompt = [*(beginning if rng.random() < 0.5 else ()), *random_prompt(rng.randint(1, 40), number)]
        params = {"max_tokens": rng.randint(1, 60), "temperature": rng.choice([0.0, 0.9]), "seed": number}
        first = request(f"r{number}", prompt, num_siblings=number % 3 == 0, **params)
        core.add_request(first)
        if number % 3 == 0:
            core.add_request(request(f"r{number}s", prompt, sibling_of=first.request_id, **params))
        if core.scheduler.running and rng.random() < 0.15:
            core.abort_request(rng.choice(core.scheduler.running).request_id)
        for _ in range(rng.choice([1, 3, 20])):
            core.step()
    drain(core)
    stats = core.stats()
    counts |= {"preempted": stats.preemptions_total, "cached": stats.prefix_cache_hits_total}
    if not graphs and not lags:
        counts.pop("followed")
    assert min(counts.values()) > 2, f"the run must meet every case to prove anything: {counts}"


def rows_of(longest: int) -> list[Sequence]:
    """A chunk of a prompt and 63 decoding rows; the first has `longest` tokens."""
    rows = []
    for slot, length in enumerate([longest] + [100] * 63):
        blocks = [(slot + i) % 1000 for i in range(-(-length // 16) + 1)]
        rows.append(sequence([1] * length, output=(3,), block_table=blocks, state_slot=slot))
        rows[-1].num_computed_tokens = length
    rows[0].output_token_ids, rows[0].num_computed_tokens = [], longest - 50
    return rows


def test_a_step_sends_no_more_for_a_long_row_than_for_a_short_one():
    sent = {}
    for longest in (100, 1 << 20):
        rows = rows_of(longest)
        tables = SentBlocks(1 + (1 << 16))
        assert len(tables.new_cells(rows)["cells"]) == sum(len(row.block_table) for row in rows)
        rows[0].block_table.extend([1, 2, 3])
        rows[5].block_table.append(4)
        batch = ScheduledBatch(rows, [50] + [1] * 63, 1)
        sent[longest] = batch_arrays(batch, 16) | tables.new_cells(rows)
        assert sent[longest]["blocks"].tolist() == [1, 2, 3, 4]
        assert len(tables.new_cells(rows)["cells"]) == 0
    sizes = {name: [arrays[name].nbytes for arrays in sent.values()] for name in sent[100]}
    assert all(short == long for short, long in sizes.values()), sizes


@torch.inference_mode()
@every_path
def test_bytes_of_a_step_do_not_grow_with_the_context(folder, graphs, monkeypatch):
    sent: list[int] = []
    upload = model_runner.upload
    monkeypatch.setattr(
        model_runner, "upload", lambda arrays, device: sent.append(packed_size(arrays)) or upload(arrays, device)
    )
    steps = []
    for length in (60, 600):
        core = make(folder, graphs=graphs, block_size=1, max_model_len=1024, prefix_cache=False)
        core.add_request(request("long", random_prompt(length, 1), max_tokens=60))
        while not core.scheduler.running or core.scheduler.running[0].num_output_tokens < 2:
            core.step()
        sent.clear()
        drain(core, *(request(f"r{i}", random_prompt(5 + i, i), max_tokens=4 + i) for i in range(5)))
        steps.append(sent.copy())
    assert steps[0] == steps[1] and len(steps[0]) > 3
