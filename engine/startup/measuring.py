"""The device's memory, shared out at start: measure what steps take, plan the pools, and account for every byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from ...configs.schema import EngineConfig
from ..errors import ConfigError
from ..execution.block_tables import BlockTables
from ..execution.graphs import GraphShape, shapes_for
from ..execution.sampler import Sampler
from ..memory.plan import MemoryPlan, MemoryUse, plan_memory
from ..sessions.carrier import device_bytes as session_bytes
from .trial_steps import StepLimits, serving_steps

if TYPE_CHECKING:
    from ...models.decoder import Decoder
    from ..execution.runner import ModelRunner

# The allocator takes memory in pieces of 2 MiB: each tensor of the pools and the rope table may leave most of one idle.
ROUNDING_BYTES = 8 * (2 << 20)
# Tensors of 1 to 10 MB share pieces of 20 MiB; steps that come in another order than those measured fill them worse.
FRAGMENTATION_BYTES = 4 * (20 << 20)
CUBLAS_BYTES = 32 << 20  # its workspace on this kind of GPU, which the last capture may take once more
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def size_pools(runner: ModelRunner, config: EngineConfig) -> tuple[MemoryPlan, MemoryUse]:
    """Measure, plan, and let the runner allocate. Raises `ConfigError` when something does not fit."""
    max_model_len = context_length(config, runner.model_config.max_model_len)
    use = _measure(runner, config, max_model_len) if runner.device.type == "cuda" else _cpu_share(runner, config)
    plan = _plan(runner, config, use, max_model_len)
    share = "memory_fraction (on a CPU cpu_memory_gb)"
    pools = f"{plan.num_state_slots} states and {plan.num_kv_blocks} KV blocks"
    with refuse_out_of_memory(pools, f"lower max_num_seqs or {share}"):
        runner.allocate(plan.num_state_slots, plan.num_kv_blocks, plan.max_model_len, plan.num_snapshots)
    positions = runner.model.position_bytes(plan.max_model_len)
    with refuse_out_of_memory(
        f"the position table of max_model_len = {plan.max_model_len} ({positions:,} bytes) beside {pools}",
        f"lower max_model_len, max_num_seqs or {share}",
    ):
        runner.model.reserve_positions(plan.max_model_len)
    use.weights += positions
    if runner.device.type == "cuda" and config.session_folder is not None:
        use.other += session_bytes(plan.max_model_len)
    kept = f"{plan.num_host_snapshots} states of host_snapshot_gb = {config.host_snapshot_gb:g}"
    with refuse_out_of_memory(kept, "lower host_snapshot_gb", where="in the host's memory"):
        runner.snapshots.allocate_on_host(plan.num_host_snapshots)
    use.state, use.snapshots = runner.states.nbytes, runner.snapshots.nbytes
    use.kv, use.sampler = runner.kv.nbytes + runner.tables.nbytes, runner.sampler.nbytes
    return plan, use


def _plan(runner: ModelRunner, config: EngineConfig, use: MemoryUse, max_model_len: int) -> MemoryPlan:
    return plan_pools(
        config,
        use,
        max_model_len=max_model_len,
        state_bytes_per_slot=runner.state_bytes_per_slot + Sampler.bytes_per_slot(runner.model_config.vocab_size),
        kv_bytes_per_token=runner.kv_bytes_per_token,
        snapshot_bytes=runner.snapshot_bytes,
        context_bytes=context_bytes(runner.model, config, runner.device),
    )


def plan_pools(
    config: EngineConfig,
    use: MemoryUse,
    *,
    max_model_len: int,
    state_bytes_per_slot: int,
    kv_bytes_per_token: int,
    snapshot_bytes: int,
    context_bytes: Callable[[int], int],
) -> MemoryPlan:
    """`plan_memory` as the settings want it, for what `use` leaves. Raises `ConfigError`, which tells all that takes
    memory."""
    try:
        return plan_memory(
            use.unassigned,
            state_bytes_per_slot=state_bytes_per_slot,
            kv_bytes_per_token=kv_bytes_per_token,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            cell_bytes=BlockTables.CELL_BYTES,
            context_bytes=context_bytes,
            num_kv_blocks=config.num_kv_blocks,
            snapshot_bytes=snapshot_bytes,
            num_snapshots=config.snapshots if config.prefix_cache else 0,
            host_bytes=int(config.host_snapshot_gb * 1e9),
        )
    except ConfigError as error:
        taken = ", ".join(f"{kind} {num_bytes:,}" for kind, num_bytes in use.by_kind().items() if num_bytes)
        raise ConfigError(f"{error} (of {use.total:,} bytes: {taken})") from None


def context_bytes(model: Decoder, config: EngineConfig, device: torch.device) -> Callable[[int], int]:
    """Bytes on the device that a context of some length takes once, whatever runs: where a token stands, for the model
    and for sessions."""
    has_buffers = device.type == "cuda" and config.session_folder is not None

    def of(length: int) -> int:
        return model.position_bytes(length) + (session_bytes(length) if has_buffers else 0)

    return of


def context_length(config: EngineConfig, longest: int) -> int:
    """The context asked for, which the checkpoint's bounds. Raises `ConfigError`."""
    wanted = config.max_model_len or longest
    if wanted > longest:
        raise ConfigError(f"max_model_len ({wanted}) exceeds the checkpoint's context ({longest}); lower it")
    return wanted


@contextlib.contextmanager
def refuse_out_of_memory(what: str, remedy: str, where: str = "on the device") -> Iterator[None]:
    """Turn running out of memory into a `ConfigError` that says what did not fit and what to change."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory: {what} did not fit {where}; {remedy}") from None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error says so, or one that it came after: a capture that fails may fail again as it ends."""
    if error is None:
        return False
    is_told = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)
    return is_told or _is_out_of_memory(error.__context__)


def _cpu_share(runner: ModelRunner, config: EngineConfig) -> MemoryUse:
    """On a CPU the share is a setting, beside the weights, and nothing is measured."""
    return MemoryUse(total=runner.weight_bytes + int(config.cpu_memory_gb * 1e9), weights=runner.weight_bytes)


def _measure(runner: ModelRunner, config: EngineConfig, max_model_len: int) -> MemoryUse:
    """The configured share of a CUDA device, and all that is on it but the pools."""
    total = int(free_memory(runner.device)[1] * config.memory_fraction)
    limits = _measured_limits(runner, config, max_model_len, total)
    step = f"a step of max_num_batched_tokens = {limits.max_tokens} tokens and {limits.num_slots} sequences"
    with refuse_out_of_memory(step, "lower max_num_batched_tokens or max_num_seqs"):
        runner.allocate(limits.num_slots, limits.num_blocks, limits.max_len)
        runner.model.reserve_positions(limits.longest_prompt + 1)
        workspace = _measure_steps(runner, limits)
    shapes = shapes_for(config, limits.num_slots)
    graphs = _measure_graphs(runner, shapes) if runner.wants_graphs else 0
    runner.release()
    free, everything = free_memory(runner.device)
    known = runner.weight_bytes + runner.model.position_bytes(limits.longest_prompt + 1)
    return MemoryUse(
        total=total,
        weights=runner.weight_bytes,
        workspace=workspace,
        graphs=graphs,
        other=everything - free - known + ROUNDING_BYTES,
    )


def _measured_limits(runner: ModelRunner, config: EngineConfig, max_model_len: int, total: int) -> StepLimits:
    """Limits of the steps to measure: no longer context and no more slots than the plan could have, and blocks for a
    token budget each."""
    free, everything = free_memory(runner.device)
    left = total - (everything - free)
    max_model_len = _plan(runner, config, MemoryUse(total=total, other=total - left), max_model_len).max_model_len
    slots = min(config.max_num_seqs, config.max_num_batched_tokens, max(1, left // 2 // runner.state_bytes_per_slot))
    budget = config.max_num_batched_tokens
    length = max(1, min(max_model_len, budget // slots)) + 1
    blocks = max(slots * -(-length // config.block_size), -(-min(max_model_len, budget) // config.block_size))
    drafts = (config.speculative_tokens, config.speculative_max_rows)
    return StepLimits(slots, blocks, config.block_size, max_model_len, budget, *drafts)


def _measure_steps(runner: ModelRunner, limits: StepLimits) -> int:
    """Bytes that steps take at their peak beside weights and pools, as the allocator holds them. Compiles them too."""
    device = runner.device
    free_memory(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = None
    for step in serving_steps(limits):
        launched = runner.launch(step)
        if before is not None:  # as when serving: what a step returns is held while the next runs
            before.wait()
        before = launched
    torch.cuda.synchronize(device)
    grown = torch.cuda.max_memory_reserved(device) - reserved
    return max(grown, torch.cuda.max_memory_allocated(device) - allocated) + FRAGMENTATION_BYTES


def _measure_graphs(runner: ModelRunner, shapes: list[GraphShape]) -> int:
    """Bytes that graphs of these shapes will take: the largest shapes their memory, by tokens and by draws, each adds
    its own nodes, as some of every kind tell."""
    free = [free_memory(runner.device)[0]]
    most_drawn = max(shapes, key=lambda shape: (shape.num_draws, shape.num_tokens))
    largest = [shape for shape in shapes if shape in (most_drawn, shapes[-1])]
    rest = [shape for shape in shapes if shape not in largest]
    some = rest[:: max(1, len(shapes) // 8)]
    for part in (largest, sorted([*some, *largest], key=shapes.index)):
        graphs = runner.capture(part)
        free.append(free_memory(runner.device)[0])
        del graphs
        free_memory(runner.device)
    own, others = free[0] - free[1], max(0, free[1] - free[2])
    return own + others * len(shapes) // max(1, len(some)) + CUBLAS_BYTES


def bound_allocator(device: torch.device, use: MemoryUse) -> None:
    """From here on the allocator gives back what it only keeps rather than take more than the share. What was measured
    stays within reach, even where the share turned out too small for it."""
    free, everything = free_memory(device)
    reserved = torch.cuda.memory_reserved(device)
    outside = everything - free - reserved
    bound = max(use.total - outside - ROUNDING_BYTES, reserved + use.workspace)  # what lies outside may grow a little
    torch.cuda.set_per_process_memory_fraction(min(1.0, bound / everything), device)


def free_memory(device: torch.device) -> tuple[int, int]:
    """(bytes free on the device, bytes it has), after giving back what the allocator only keeps."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)
