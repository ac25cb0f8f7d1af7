"""Measures the memory that a GPU needs beside the pools, by steps of a temporary runner, before the pools are
planned."""

from __future__ import annotations

import torch

from ...configs.schema import EngineConfig
from ..execution.graph_shapes import GraphShape, shapes_for
from ..execution.graphs import StepGraphs
from ..execution.launcher import Launcher
from ..execution.pools import DevicePools
from ..execution.runner import ModelRunner
from ..execution.served_model import ServedModel
from ..memory.groups import num_tensors
from ..messages import MemoryUse
from .device_memory import ALLOCATED_BYTES, free_memory, refuse_out_of_memory
from .planning import plan
from .trial_steps import StepLimits, serving_steps

# The allocator puts tensors of 1 to 10 MB into segments of 20 MiB. Serving runs steps in another order than was
# measured, which may fill the segments worse.
FRAGMENTATION_BYTES = 4 * (20 << 20)
OTHER_TENSORS = 3  # large tensors beside weights and pools: snapshots, the rope table, block tables
CUBLAS_BYTES = 32 << 20  # cuBLAS's workspace on a Hopper GPU; the last capture may allocate one more


def measure(served: ServedModel, config: EngineConfig) -> MemoryUse:
    """The configured share of the device, and every use of it except the pools. On a CPU the share is a setting beside
    the weights, and nothing is measured. Raises `ConfigError` if the largest step does not fit."""
    if served.device.type == "cuda":
        return _measure(served, config)
    return MemoryUse(total=served.weight_bytes + int(config.cpu_memory_gb * 1e9), weights=served.weight_bytes)


def wants_graphs(served: ServedModel, config: EngineConfig) -> bool:
    """Whether steps run from CUDA graphs."""
    return config.cuda_graphs and served.device.type == "cuda" and served.kernel_name == "triton"


def capture(runner: ModelRunner, shapes: list[GraphShape], *, progress: bool = False) -> StepGraphs:
    """Capture a CUDA graph of the runner's step per shape. Raises `ConfigError` if the graphs do not fit."""
    most = max(max(shape.num_decodes, shape.num_verifies) for shape in shapes)
    remedy = "lower max_graph_rows or max_num_seqs, or set cuda_graphs to false"
    with refuse_out_of_memory(f"CUDA graphs of up to {most} rows", remedy):
        return StepGraphs(runner.compute, shapes, runner.pools.tables, runner.device, progress=progress)


def _measure(served: ServedModel, config: EngineConfig) -> MemoryUse:
    total = int(free_memory(served.device)[1] * config.memory_fraction)
    limits = _measured_limits(served, config, total)
    workspace, graphs = _measure_serving(served, config, limits)
    free, everything = free_memory(served.device)
    known = served.weight_bytes + served.model.position_bytes(limits.longest_prompt + 1)
    return MemoryUse(
        total=total,
        weights=served.weight_bytes,
        workspace=workspace,
        graphs=graphs,
        other=everything - free - known + ALLOCATED_BYTES * (num_tensors(served.model.caches) + OTHER_TENSORS),
    )


def _measured_limits(served: ServedModel, config: EngineConfig, total: int) -> StepLimits:
    """Limits of the trial steps to measure. Context and slots are no more than a plan without a workspace has. The
    blocks hold one step's tokens, in one long prompt or in a prompt per slot."""
    free, everything = free_memory(served.device)
    left = total - (everything - free)
    max_model_len = plan(served, config, MemoryUse(total=total, other=total - left)).max_model_len
    slots = min(config.max_num_seqs, config.max_num_batched_tokens, max(1, left // 2 // served.state_bytes_per_slot))
    budget = config.max_num_batched_tokens
    length = max(1, min(max_model_len, budget // slots)) + 1
    blocks = max(slots * -(-length // config.block_size), -(-min(max_model_len, budget) // config.block_size))
    drafts = (config.speculative_tokens, config.speculative_max_rows)
    return StepLimits(slots, blocks, config.block_size, max_model_len, budget, *drafts)


def _measure_serving(served: ServedModel, config: EngineConfig, limits: StepLimits) -> tuple[int, int]:
    """(bytes of the largest step's workspace, bytes of all graphs). Frees its runner and pools."""
    step = f"a step of max_num_batched_tokens = {limits.max_tokens} tokens and {limits.num_slots} sequences"
    with refuse_out_of_memory(step, "lower max_num_batched_tokens or max_num_seqs"):
        pools = DevicePools.allocate(
            served,
            num_slots=limits.num_slots,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_model_len=limits.max_len,
        )
        runner = ModelRunner(served, pools)
        served.model.reserve_positions(limits.longest_prompt + 1)
        workspace = _measure_steps(runner, limits)
    shapes = shapes_for(config, limits.num_slots, prompts=served.prompts_in_graphs)
    return workspace, _measure_graphs(runner, shapes) if wants_graphs(served, config) else 0


def _measure_steps(runner: ModelRunner, limits: StepLimits) -> int:
    """Bytes that the allocator takes for steps at their peak, beside weights and pools. Also compiles their kernels."""
    device = runner.device
    free_memory(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, launcher = None, Launcher(runner)
    for step in serving_steps(limits):
        launched = launcher.launch(step)
        if before is not None:  # as in serving: a step's results are held while the next step runs
            before.wait()
        before = launched
    torch.cuda.synchronize(device)
    grown = torch.cuda.max_memory_reserved(device) - reserved
    return max(grown, torch.cuda.max_memory_allocated(device) - allocated) + FRAGMENTATION_BYTES


def _measure_graphs(runner: ModelRunner, shapes: list[GraphShape]) -> int:
    """Estimate the bytes that graphs of these shapes will take. The largest shapes, by tokens and by draws, give the
    memory that all graphs share. A sample of the others gives the memory of one graph's own nodes."""
    free = [free_memory(runner.device)[0]]
    most_drawn = max(shapes, key=lambda shape: (shape.num_draws, shape.num_tokens))
    largest = [shape for shape in shapes if shape in (most_drawn, shapes[-1])]
    rest = [shape for shape in shapes if shape not in largest]
    some = rest[:: max(1, len(shapes) // 8)]
    for part in (largest, sorted([*some, *largest], key=shapes.index)):
        graphs = capture(runner, part)
        free.append(free_memory(runner.device)[0])
        del graphs
        free_memory(runner.device)
    own, others = free[0] - free[1], max(0, free[1] - free[2])
    return own + others * len(shapes) // max(1, len(some)) + CUBLAS_BYTES
