"""Every byte is accounted for, what is printed at start is reached, and what does not fit says which setting to change.

A CUDA device's counters are faked here; `test_memory_on_gpu.py` asks a real one.
"""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from backends import BACKENDS, PlainBackend
from engines import drain, engine_config, make_core, request
from leyden.engine.errors import ConfigError
from leyden.engine.execution import pools as execution_pools
from leyden.engine.execution.graph_shapes import GraphShape, shapes_for
from leyden.engine.execution.launcher import Launcher
from leyden.engine.execution.pools import DevicePools
from leyden.engine.memory import pools
from leyden.engine.memory.operations import Fold
from leyden.engine.memory.plan import PoolCosts, plan_pools
from leyden.engine.messages import MemoryUse
from leyden.engine.startup import build as startup
from leyden.engine.startup import device_memory, measuring
from leyden.engine.startup import model as startup_model
from leyden.engine.startup.build import Built, build
from leyden.engine.startup.trial_steps import StepLimits, serving_steps, smallest_steps, snapshot_step
from leyden.models.decoder import Decoder
from leyden.models.mixers.lightning_backends import LIGHTNING_BACKENDS
from tiny_models import FULL, LINEAR, save_minimax

CUDA = torch.device("cuda")


def start(folder, **settings) -> Built:
    return build(engine_config(folder, **settings), progress=False)


# -- accounting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "replay"])
def test_every_byte_of_the_share_is_accounted_for(tiny, backend):
    core = make_core(tiny.folder, linear_backend=backend, cpu_memory_gb=0.05)
    use, info, runner = core.info.memory, core.info, core.runner
    rope = runner.model.position_bytes(core.max_model_len)
    assert use.weights == info.weight_bytes + rope > info.weight_bytes
    assert use.state == info.num_state_slots * info.state_bytes_per_slot == runner.pools.states.nbytes
    assert use.kv == runner.pools.kv.nbytes + runner.tables.nbytes
    assert runner.pools.kv.nbytes == info.num_kv_blocks * info.block_size * info.kv_bytes_per_token
    assert use.sampler == runner.sampler.nbytes
    assert use.total == info.weight_bytes + int(0.05e9)
    assert (use.workspace, use.graphs, use.other) == (0, 0, 0)
    assert sum(use.by_kind().values()) + use.unassigned == use.total
    assert use.unassigned >= 0


LONG = 10_240_000  # positions, as MiniMax-Text-01 says


@pytest.fixture
def long_folder(tmp_path):
    """A model whose table of all positions takes 655 MB."""
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LONG}))
    return tmp_path


@pytest.mark.parametrize("megabytes", [4, 50])
def test_a_context_too_long_for_the_share_is_charged_as_it_is_clamped(long_folder, megabytes):
    core = make_core(long_folder, max_model_len=None, cpu_memory_gb=megabytes / 1000)
    use, length = core.info.memory, core.max_model_len
    assert use.weights == core.runner.served.weight_bytes + core.runner.model.position_bytes(length)
    assert [len(table.cos_sin) for table in core.runner.model.rotary] == [length] and length < LONG
    assert length * (64 + 256) > 0.8 * megabytes * 10**6, "most of the share goes to keys, values and positions"
    assert 0 <= use.unassigned < 0.02 * megabytes * 10**6
    assert f"max_model_len clamped from {LONG} to {length}" in core.info.notes[0]
    assert len(drain(core, request("a", [1] * 40, max_tokens=4))["a"].token_ids) == 4


class FakeDevice:
    """The counters of a CUDA device of 10 GB with 1 GB in use by others, where each step reserves 3 MB. What is started
    here has its weights on the CPU, no pools, and notes its steps."""

    def __init__(self, monkeypatch) -> None:
        self.steps, self.allocated, self.contexts, self.reserved = [], [], [], 0
        self._load = startup.load_model
        monkeypatch.setattr(startup, "load_model", self.load_model)
        monkeypatch.setattr(DevicePools, "allocate", self.allocate)
        for module in (startup, measuring):
            monkeypatch.setattr(module, "ModelRunner", self.make_runner)
            monkeypatch.setattr(module, "Launcher", lambda runner: SimpleNamespace(launch=self.launch))
        monkeypatch.setattr(measuring, "free_memory", lambda device: (9 * 10**9 - self.reserved, 10**10))
        for name in ("memory_allocated", "memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, lambda device: self.reserved)
            monkeypatch.setattr(torch.cuda, f"max_{name}", lambda device: self.reserved + 3_000_000 * bool(self.steps))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    def load_model(self, config, *, progress):
        served = dataclasses.replace(self._load(config, progress=progress), device=CUDA)
        self.reserved = served.weight_bytes
        return served

    def allocate(self, served, *, num_slots, num_blocks, block_size, max_model_len, num_snapshots=0):
        self.allocated.append((num_slots, num_blocks))
        self.contexts.append(max_model_len)
        return SimpleNamespace(snapshots=SimpleNamespace(allocate_on_host=lambda num_on_host: None))

    def make_runner(self, served, pools):
        self.is_measuring = len(self.allocated) == 1
        return SimpleNamespace(served=served, pools=pools, device=CUDA)

    def launch(self, step):
        if self.is_measuring:
            self.steps.append(step)
        return self

    def wait(self) -> None:
        pass


@pytest.fixture
def device(monkeypatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def test_share_of_a_gpu_leaves_out_other_processes_and_the_largest_step(device, tiny):
    _, plan, use = start(tiny.folder, memory_fraction=0.5, max_num_seqs=3, prefix_cache=False)
    assert use.total == 5 * 10**9
    assert use.workspace == 3_000_000 + measuring.FRAGMENTATION_BYTES
    assert use.other == pytest.approx(10**9, rel=0.02) and use.other > 10**9
    assert device.allocated == [device.allocated[0], (plan.num_state_slots, plan.num_kv_blocks)]
    assert (plan.num_state_slots, plan.num_kv_blocks) == (3, 3 * 256 // 16)


def test_states_that_the_plan_would_clamp_are_not_allocated_to_measure(device, tiny):
    served = device.load_model(engine_config(tiny.folder), progress=False)
    slot = served.state_bytes_per_slot
    share = 10**9 + served.weight_bytes + 41 * slot
    use = measuring.measure(
        served, engine_config(tiny.folder, memory_fraction=share / 10**10, max_num_seqs=64, max_model_len=256)
    )
    assert device.allocated[0][0] == 20, "half of what is left"
    assert use.unassigned < 41 * slot


def test_a_gpus_steps_are_measured_with_the_context_that_its_share_holds(monkeypatch, device, long_folder):
    reserved = []
    monkeypatch.setattr(Decoder, "reserve_positions", lambda model, length: reserved.append(length))
    runner, plan, use = start(long_folder, max_model_len=None, memory_fraction=0.14, session_folder=str(long_folder))
    measured, served = device.contexts
    widest = max(len(row.block_table) for step in device.steps for row in step.sequences)
    assert plan.max_model_len == served <= measured < 4 * 10**8 / (64 + 256), "0.4 GB hold no more"
    assert widest * 16 <= measured + 16 and reserved[-1] == served
    assert use.weights == runner.served.weight_bytes + runner.served.model.position_bytes(served)
    assert use.other < 1.1 * 10**9


@pytest.mark.parametrize("gigabytes", [0.3, 1.0, 7.5])
def test_a_gigabyte_of_the_host_is_a_thousand_million_bytes(gigabytes):
    config = engine_config("x", host_snapshot_gb=gigabytes)
    costs = PoolCosts(slot=1000, token=10, block_size=16, snapshot=4096)
    plan = plan_pools(config, MemoryUse(total=10**9), costs, max_model_len=256)
    assert plan.num_host_snapshots == int(gigabytes * 1e9) // 4096


# -- capacity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("num_kv_blocks", [None, 16, 37], ids=["every context", "16 blocks", "37 blocks"])
def test_capacity_told_at_start_is_reached_without_preemption(tiny, num_kv_blocks, is_async):
    settings = {
        "max_model_len": 1024,
        "async_scheduling": is_async,
        "max_num_batched_tokens": 1024,
        "prefix_cache": False,
    }
    core = make_core(tiny.folder, num_kv_blocks=num_kv_blocks, **settings)
    info = core.info
    share, rest = divmod(info.num_kv_blocks, info.num_state_slots)
    answer = info.block_size - 1  # within the last block, which a prompt has begun: all hold all of theirs at once
    for slot in range(info.num_state_slots):
        room = (share + (rest if slot == 0 else 0)) * info.block_size
        core.add_request(request(f"r{slot}", [1] * (room - answer), max_tokens=answer, ignore_eos=True))
    most_running = most_blocks = 0
    while core.has_work:
        core.step()
        stats = core.stats()
        most_running, most_blocks = max(most_running, stats.num_running), max(most_blocks, stats.kv_blocks_used)
    assert (most_running, most_blocks) == (info.num_state_slots, info.num_kv_blocks)
    assert core.stats().preemptions_total == 0
    core.check_integrity()


# -- trial steps ----------------------------------------------------------------------------------------------

LIMITS = {
    "plain": StepLimits(num_slots=4, num_blocks=40, block_size=16, max_len=128, max_tokens=256),
    "one slot": StepLimits(num_slots=1, num_blocks=8, block_size=16, max_len=128, max_tokens=64),
    "one token": StepLimits(num_slots=3, num_blocks=3, block_size=1, max_len=1, max_tokens=3),
    "two tokens": StepLimits(num_slots=3, num_blocks=6, block_size=1, max_len=2, max_tokens=3),
    "a budget of one": StepLimits(num_slots=1, num_blocks=2, block_size=16, max_len=32, max_tokens=1),
    "a token for each": StepLimits(num_slots=5, num_blocks=10, block_size=1, max_len=64, max_tokens=5),
    "more slots than blocks": StepLimits(num_slots=4, num_blocks=3, block_size=4, max_len=12, max_tokens=16),
    "drafts": StepLimits(4, 40, 16, max_len=128, max_tokens=256, max_drafts=7, max_drafted=3),
    "drafts in small blocks": StepLimits(3, 60, 1, max_len=64, max_tokens=64, max_drafts=7, max_drafted=8),
    "drafts in a small budget": StepLimits(4, 40, 2, max_len=64, max_tokens=5, max_drafts=7, max_drafted=8),
    "no room for drafts": StepLimits(1, 4, 16, max_len=64, max_tokens=1, max_drafts=7, max_drafted=8),
    "a context without drafts": StepLimits(2, 4, 1, max_len=2, max_tokens=16, max_drafts=7, max_drafted=8),
    "a context of one draft": StepLimits(2, 6, 2, max_len=3, max_tokens=16, max_drafts=7, max_drafted=8),
    "a short context": StepLimits(num_slots=2, num_blocks=2, block_size=16, max_len=9, max_tokens=512),
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
@pytest.mark.parametrize("make", [smallest_steps, serving_steps])
def test_trial_steps_keep_within_their_limits(make, limits):
    steps = list(make(limits))
    assert steps
    for step in steps:
        counts = step.num_scheduled_tokens
        assert sum(counts) > 0 and len(counts) == len(step.sequences)
        if make is serving_steps:
            assert sum(counts) <= limits.max_tokens
        slots = [sequence.state_slot for sequence in step.sequences]
        assert len(set(slots)) == len(slots) and max(slots) < limits.num_slots
        for row, (sequence, count) in enumerate(zip(step.sequences, counts, strict=True)):
            end = sequence.num_computed_tokens + count
            assert end <= limits.max_len
            assert len(sequence.block_table) * limits.block_size >= end
            assert max(sequence.block_table) < limits.num_blocks
            assert (sequence.num_computed_tokens > 0) == (row >= step.num_prefills or step.num_drafted > 0)
            assert sequence.num_uncomputed_tokens + (len(step.drafts[row]) if step.drafts else 0) == count
        assert step.num_drafted in (0, len(counts)) and bool(step.num_drafted) == any(step.drafts)


@pytest.mark.parametrize("every", [1, 64])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_trial_step_saves_on_its_way_only_where_layers_can(limits, every):
    step = snapshot_step(limits, num_pending=1, every=every)
    (sequence,) = step.sequences
    end = sequence.num_computed_tokens + 1
    assert end <= limits.max_len and max(sequence.block_table) < limits.num_blocks
    assert len(sequence.block_table) * limits.block_size >= end
    assert [(save.row, save.num_tokens) for save in step.snapshots] == ([(0, 1)] if limits.max_len >= every else [])
    assert end % every == 0 or not step.snapshots


def test_trial_steps_hold_the_largest_of_each_kind():
    limits = LIMITS["plain"]
    shapes = {
        (step.num_prefills, len(step.sequences), sum(step.num_scheduled_tokens)) for step in serving_steps(limits)
    }
    for shape in [(4, 4, 256), (1, 1, 128), (1, 1, 1), (2, 2, 193), (1, 3, 130), (0, 1, 1), (0, 4, 4)]:
        assert shape in shapes, shape


def test_steps_with_drafts_are_measured_up_to_the_most_rows_and_tokens():
    def largest(limits: StepLimits) -> list[tuple[int, int]]:
        return [
            (step.num_drafted, sum(step.num_scheduled_tokens)) for step in serving_steps(limits) if step.num_drafted
        ]

    assert largest(LIMITS["drafts"]) == [(1, 8), (2, 9), (3, 17)], "one that asks for more has no drafts"
    assert largest(LIMITS["drafts in a small budget"]) == [(1, 5), (2, 5), (4, 5)]
    for name in ("plain", "no room for drafts", "a context without drafts"):
        assert largest(LIMITS[name]) == []
        assert not any(step.num_drafted for step in smallest_steps(LIMITS[name]))


def test_a_fold_is_compiled_at_start_and_finds_a_token_to_fold():
    drafted = [step for step in smallest_steps(LIMITS["drafts"]) if step.num_drafted]
    assert [step.operations for step in drafted] == [[], [Fold(0, 1, 1)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_steps_leave_numbers(tiny, monkeypatch, backend):
    """What no step has written may be NaN, and is never read."""
    allocate, launch = DevicePools.allocate, Launcher.launch
    drawn: list[list[int]] = []

    def poisoned(served, **sizes):
        pools = allocate(served, **sizes)
        for pool in (*pools.states.tensors, *pools.kv.tensors):
            pool.fill_(float("nan"))
        return pools

    def launched(self, step):
        result = launch(self, step)
        drawn.append(result.wait()[0])
        return result

    monkeypatch.setattr(DevicePools, "allocate", poisoned)
    monkeypatch.setattr(Launcher, "launch", launched)
    start(tiny.folder, linear_backend=backend, speculative_tokens=7)
    assert len(drawn) == 5 and min(min(tokens) for tokens in drawn) >= 0


def test_the_settings_say_which_steps_with_drafts_are_measured(device, tiny):
    start(tiny.folder, speculative_tokens=3, speculative_max_rows=2)
    assert max(len(each) for step in device.steps for each in step.drafts) == 3
    assert max(step.num_drafted for step in device.steps) == 2


@pytest.mark.parametrize("backend", ["auto", "minimax", "replay"])
def test_a_decode_row_of_a_trial_reads_only_slots_that_a_prompt_wrote_before(tiny, backend):
    """A state that nobody wrote may hold NaN, and choose experts that do not exist."""
    core = make_core(tiny.folder, linear_backend=backend, speculative_tokens=7)
    pools = core.runner.pools
    for pool in (*pools.states.tensors, *pools.kv.tensors):
        pool.fill_(float("nan"))
    limits = StepLimits(4, 64, 16, 256, 64, max_drafts=7, max_drafted=4)
    for step in serving_steps(limits):
        tokens, _ = core.launcher.launch(step).wait()
        num_drafts = sum(map(len, step.drafts))
        assert len(tokens) == len(step.sequences) + num_drafts and min(tokens) >= 0


# -- graphs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_seqs", [1, 8, 64])
@pytest.mark.parametrize("max_rows", [1, 8, 64])
def test_graphs_are_measured_with_the_most_tokens_and_the_most_rows_of_logits(monkeypatch, num_seqs, max_rows):
    settings = {"max_num_seqs": num_seqs, "speculative_tokens": 7, "speculative_max_rows": max_rows}
    shapes = shapes_for(engine_config("x", **settings, max_num_batched_tokens=2048), num_seqs)
    captured: list[list[GraphShape]] = []
    monkeypatch.setattr(measuring, "capture", lambda runner, part: captured.append(part))
    monkeypatch.setattr(measuring, "free_memory", lambda device: (10**10 - 1000 * len(captured), 10**10))
    measuring._measure_graphs(SimpleNamespace(device=CUDA), shapes)
    for part in captured:
        assert part == sorted(part, key=shapes.index) and len(set(part)) == len(part)
        assert max(shape.num_tokens for shape in part) == max(shape.num_tokens for shape in shapes)
        assert max(shape.num_draws for shape in part) == max(shape.num_draws for shape in shapes)
    assert len(captured[0]) <= 2 < len(captured[1]) <= len(shapes)


# -- what does not fit ----------------------------------------------------------------------------------------


def test_a_backend_without_room_for_drafts_is_told_at_start(tiny, monkeypatch):
    monkeypatch.setitem(LIGHTNING_BACKENDS, "seg_la", lambda kernels, *, speculative=False: PlainBackend(kernels))
    start(tiny.folder, linear_backend="seg_la")
    with pytest.raises(ConfigError, match=r"speculative_tokens = 7: linear_backend plain keeps 0 .* need 9"):
        start(tiny.folder, linear_backend="seg_la", speculative_tokens=7)


@pytest.mark.parametrize("drafts", [0, 5])
def test_an_engine_runs_on_a_backend_that_follows_the_protocol_alone(tiny, monkeypatch, drafts):
    requests = [request(str(i), [i, 7, 8, 9] * 9, max_tokens=30) for i in range(3)]
    expected = drain(make_core(tiny.folder), *requests)
    monkeypatch.setitem(LIGHTNING_BACKENDS, "seg_la", PlainBackend)
    core = make_core(tiny.folder, linear_backend="seg_la", speculative_tokens=drafts)
    assert core.info.linear_backend == "plain"
    answers = drain(core, *requests)
    assert {name: each.token_ids for name, each in answers.items()} == {
        name: each.token_ids for name, each in expected.items()
    }
    assert (core.stats().draft_tokens_total > 0) == (drafts > 0)


def fail(*arguments, **keywords):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def refused(tiny, *words: str, **settings) -> None:
    with pytest.raises(ConfigError) as error:
        start(tiny.folder, **settings)
    for word in ("out of memory", *words):
        assert word in str(error.value)
    assert error.value.__suppress_context__


def test_weights_that_do_not_fit(tiny, monkeypatch):
    monkeypatch.setattr(startup_model, "load_weights", fail)
    refused(tiny, "weights", "dtype")


@pytest.mark.parametrize("part", ["StatePool", "KVPool", "Sampler"])
def test_pools_that_do_not_fit(tiny, monkeypatch, part):
    monkeypatch.setattr(execution_pools, part, fail)
    monkeypatch.setattr(fail, "bytes_per_slot", lambda vocab: 1, raising=False)
    refused(tiny, "4 states", "max_num_seqs", "memory_fraction", "cpu_memory_gb")


def test_states_that_the_hosts_memory_does_not_hold(tiny, monkeypatch):
    def too_large(*shape, device=None, **others):
        sizes = shape[0] if isinstance(shape[0], tuple) else shape
        if device is None and sizes[0] > 0:  # as the allocator of the CPU says it
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return torch.empty(*shape, device=device, **others)

    monkeypatch.setattr(pools, "torch", SimpleNamespace(empty=too_large, uint8=torch.uint8))
    refused(
        tiny,
        "host_snapshot_gb = 0.001",
        "did not fit in the host's memory; lower host_snapshot_gb",
        host_snapshot_gb=0.001,
    )


def test_a_rope_table_that_does_not_fit(tiny, monkeypatch):
    monkeypatch.setattr("leyden.models.layers.rotary.RotaryTable.reserve", fail)
    refused(tiny, "position table of max_model_len = 256 (16,384 bytes)", "lower max_model_len", "memory_fraction")


def test_share_without_room_for_one_sequence_lists_its_uses(tiny):
    with pytest.raises(ConfigError) as error:
        start(tiny.folder, cpu_memory_gb=1e-5)
    weights = start(tiny.folder).runner.served.weight_bytes
    assert "8,976 bytes are free" in str(error.value)
    assert f"(of {weights + 10_000:,} bytes: weights {weights:,})" in str(error.value)


def test_a_first_step_that_does_not_fit(tiny, monkeypatch):
    monkeypatch.setattr(Launcher, "launch", fail)
    refused(tiny, "first step", "max_num_batched_tokens", "memory_fraction")


def test_a_largest_step_that_does_not_fit(device, tiny, monkeypatch):
    monkeypatch.setattr(device, "launch", fail)
    with pytest.raises(
        ConfigError, match=r"max_num_batched_tokens = 64 .*lower max_num_batched_tokens or max_num_seqs"
    ):
        start(tiny.folder)


def test_pools_to_measure_with_that_do_not_fit(device, tiny, monkeypatch):
    monkeypatch.setattr(DevicePools, "allocate", fail)
    with pytest.raises(ConfigError, match=r"a step of .* did not fit on the device; .*max_num_seqs"):
        start(tiny.folder)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["allocator", "driver", "cublas"],
)
def test_graphs_that_do_not_fit(tiny, monkeypatch, error):
    def capture(*arguments, **keywords):
        try:
            raise error
        finally:  # as a capture does that ends after an error
            raise RuntimeError("capture failed due to a previous error")

    runner = start(tiny.folder).runner
    monkeypatch.setattr(measuring, "StepGraphs", capture)
    with pytest.raises(ConfigError, match=r"8 rows.*max_graph_rows.*cuda_graphs"):
        measuring.capture(runner, [GraphShape(1), GraphShape(8)])


def test_error_that_is_not_about_memory_passes_unchanged(tiny, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("an illegal instruction was encountered")

    monkeypatch.setattr(Launcher, "launch", broken)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        start(tiny.folder)


def test_graphs_that_take_more_than_measured_are_noted(tiny, monkeypatch):
    built = start(tiny.folder)
    free = [9 * 10**9, 9 * 10**9 - built.use.unassigned - 1000]
    monkeypatch.setattr(startup, "free_memory", lambda device: (free.pop(0), 10**10))
    monkeypatch.setattr(startup, "capture", lambda *arguments, **keywords: "graphs")
    runner, plan, use = startup._with_graphs(built, engine_config("x"), progress=False)
    assert runner.graphs == "graphs" and runner.pools is built.runner.pools
    assert use.unassigned == -1000 and "memory_fraction is exceeded by 1,000 bytes" in plan.notes[-1]


def test_allocators_bound_is_the_share_less_memory_outside(monkeypatch):
    told: list[float] = []
    monkeypatch.setattr(device_memory, "ROUNDING_BYTES", 100)
    monkeypatch.setattr(device_memory, "free_memory", lambda device: (4000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share))
    device_memory.bound_allocator(CUDA, MemoryUse(total=8000, workspace=500))
    device_memory.bound_allocator(CUDA, MemoryUse(total=5800, workspace=500))
    assert told == [0.69, 0.55], "8000 less 1000 outside; never less than what is held and the workspace"
