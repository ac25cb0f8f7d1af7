"""The start of an engine: load, measure, plan, allocate, warm up, capture, once and in this order."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import msgspec

from ...configs.schema import EngineConfig
from ..execution.graph_shapes import shapes_for
from ..execution.launcher import Launcher
from ..execution.pools import DevicePools
from ..execution.runner import ModelRunner
from ..execution.served_model import ServedModel
from ..memory.plan import MemoryPlan
from ..messages import MemoryUse
from .device_memory import free_memory, refuse_out_of_memory
from .measuring import capture, measure, wants_graphs
from .model import load_model
from .planning import plan, planned_use
from .trial_steps import StepLimits, smallest_steps, snapshot_step


class Built(NamedTuple):
    """A runner that has run its first steps, with its memory plan and memory use."""

    runner: ModelRunner
    plan: MemoryPlan
    use: MemoryUse


def build(config: EngineConfig, *, progress: bool = True) -> Built:
    """Start on the device that the settings name. It becomes the calling thread's current device.

    Raises `CheckpointError`, or `ConfigError` if a setting is wrong or memory does not suffice. The error's text says
    which setting to change.
    """
    served = load_model(config, progress=progress)
    measured = measure(served, config)
    memory_plan = plan(served, config, measured)
    pools = _allocate(served, config, memory_plan)
    use = planned_use(served, config, memory_plan, measured)
    runner = ModelRunner(served, pools)
    _warm_up(runner, config, memory_plan)
    if not wants_graphs(served, config):
        return Built(runner, memory_plan, use)
    return _with_graphs(Built(runner, memory_plan, use), config, progress=progress)


def _allocate(served: ServedModel, config: EngineConfig, plan: MemoryPlan) -> DevicePools:
    """Allocate the pools, the model's position tables and the host snapshots."""
    share = "memory_fraction (on a CPU cpu_memory_gb)"
    what = f"{plan.num_state_slots} states and {plan.num_kv_blocks} KV blocks"
    with refuse_out_of_memory(what, f"lower max_num_seqs or {share}"):
        pools = DevicePools.allocate(
            served,
            num_slots=plan.num_state_slots,
            num_blocks=plan.num_kv_blocks,
            block_size=config.block_size,
            max_model_len=plan.max_model_len,
            num_snapshots=plan.num_snapshots,
        )
    positions = served.model.position_bytes(plan.max_model_len)
    with refuse_out_of_memory(
        f"the position table of max_model_len = {plan.max_model_len} ({positions:,} bytes) beside {what}",
        f"lower max_model_len, max_num_seqs or {share}",
    ):
        served.model.reserve_positions(plan.max_model_len)
    kept = f"{plan.num_host_snapshots} states of host_snapshot_gb = {config.host_snapshot_gb:g}"
    with refuse_out_of_memory(kept, "lower host_snapshot_gb", where="in the host's memory"):
        pools.snapshots.allocate_on_host(plan.num_host_snapshots)
    return pools


def _warm_up(runner: ModelRunner, config: EngineConfig, plan: MemoryPlan) -> None:
    """Run the first steps on the real pools. They leave garbage in slot 0 and the first blocks, which no later owner
    reads. On CUDA the steps of `measure` have compiled the kernels already, or the capture of graphs will."""
    limits = StepLimits(
        plan.num_state_slots,
        plan.num_kv_blocks,
        config.block_size,
        plan.max_model_len,
        max_tokens=2,
        max_drafts=config.speculative_tokens,
        max_drafted=1,
    )
    launcher = Launcher(runner)
    with refuse_out_of_memory("a first step beside the pools", "lower memory_fraction or max_num_batched_tokens"):
        for step in smallest_steps(limits):
            launcher.launch(step).wait()
        if plan.num_snapshots:
            served = runner.served
            launcher.launch(snapshot_step(limits, min(1, served.ring.capacity), served.snapshot_every)).wait()


def _with_graphs(built: Built, config: EngineConfig, *, progress: bool) -> Built:
    """The same runner with CUDA graphs. Their measured memory replaces the estimate in `use`."""
    runner, plan, use = built
    before = free_memory(runner.device)[0]
    shapes = shapes_for(config, plan.num_state_slots, prompts=runner.served.prompts_in_graphs)
    graphs = capture(runner, shapes, progress=progress)
    use = msgspec.structs.replace(use, graphs=before - free_memory(runner.device)[0])
    if use.unassigned < 0:
        note = f"CUDA graphs took more than measured: memory_fraction is exceeded by {-use.unassigned:,} bytes"
        plan = dataclasses.replace(plan, notes=[*plan.notes, note])
    return Built(ModelRunner(runner.served, runner.pools, graphs), plan, use)
