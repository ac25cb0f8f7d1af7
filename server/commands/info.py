"""What a person reads from `leyden info`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ...configs.schema import EngineConfig
from ...engine.errors import ConfigError
from ...engine.memory.plan import MemoryUse
from .banner import count, drafts, replaced, size, snapshots, split

if TYPE_CHECKING:
    import torch

    from ...models.decoder import Decoder

CONTEXTS = (1024, 8192, 32768, 131072, 1048576)


def describe_model(config: EngineConfig, memory_gb: float | None) -> str:
    """Layers, parameters, bytes per sequence and token, and how many sequences fit. Loads no weights, but looks whether
    those that are there are the ones that the config asks for, and whether the tokenizer that is there can be loaded.

    Raises `CheckpointError` or `ConfigError`.
    """
    import torch

    from ...engine.execution.block_tables import BlockTables
    from ...engine.execution.sampler import Sampler
    from ...engine.startup.device import pick_device, pick_dtype
    from ...engine.startup.measuring import context_bytes
    from ...engine.text.tokenizer import Tokenizer
    from ...engine.text.tokenizer_files import TOKENIZER_FILE
    from ...kernels import load
    from ...models.decoder import Decoder
    from ...models.families.registry import names_of, read_config
    from ...models.layers.build import Build
    from ...models.loading.checkpoint import resolve
    from ...models.loading.weights import check_weights, has_weights
    from ...models.mixers.lightning_backends import LINEAR_BACKENDS

    folder = resolve(config.model, config.revision, weights=False)
    model_config = read_config(folder)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, model_config, device)
    kernels = load("torch")
    backend = LINEAR_BACKENDS[config.linear_backend](kernels, speculative=config.speculative_tokens > 0)
    model = Decoder(model_config, Build(kernels, torch.device("meta"), dtype), backend)
    if (folder / TOKENIZER_FILE).exists() or config.tokenizer or config.chat_template:
        Tokenizer.of(config)
    if config.load_format != "dummy" and has_weights(folder):
        check_weights(folder, model.targets(), names_of(model.spec), ignored=model.ignored_names())
    weight_bytes = sum(p.nbytes for p in model.parameters())
    state_dtype = getattr(torch, config.state_dtype)
    state = model_config.state_bytes_per_sequence(state_dtype.itemsize)
    state += model_config.ring_bytes_per_sequence(backend.ring_size, dtype.itemsize)
    kv = model_config.kv_bytes_per_token(dtype.itemsize)
    lines = [
        f"{folder}",
        *replaced(config, 18),
        f"  architecture       {model_config.architecture}",
        f"  layers             {len(model_config.linear_layers)} lightning, {len(model_config.full_layers)} softmax",
        f"  parameters         {count(sum(p.numel() for p in model.parameters()))} ({size(weight_bytes)} in "
        f"{str(dtype).removeprefix('torch.')})",
        f"  context            {model_config.max_model_len:,} tokens",
        f"  state per sequence {size(state)} in {config.state_dtype}, whatever its length",
        f"  KV cache per token {size(kv)}",
    ]
    use, where = _share(config, memory_gb, device, weight_bytes)
    once = context_bytes(model, config, device)
    lines += _planned(config, model, use, where, state=state, kv=kv, context_bytes=once)
    lines.append(f"  sequences that fit beside the weights in {size(use.total)} ({where}):")
    for length in sorted({min(context, model_config.max_model_len) for context in CONTEXTS}):
        each = state + Sampler.bytes_per_slot(model_config.vocab_size) + kv * length
        each += BlockTables.bytes_per_slot(length, config.block_size)
        lines.append(f"    {length:>9,} tokens each: {max(0, (use.unassigned - once(length)) // each):,}")
    return "\n".join(lines)


def _share(
    config: EngineConfig, memory_gb: float | None, device: torch.device, weight_bytes: int
) -> tuple[MemoryUse, str]:
    """The memory to plan for, with the weights in it, and where the number comes from."""
    if memory_gb is not None:
        return MemoryUse(total=int(memory_gb * 1e9), weights=weight_bytes), "as given"
    if device.type == "cuda":
        import torch

        total = int(torch.cuda.get_device_properties(device).total_memory * config.memory_fraction)
        where = f"memory_fraction {config.memory_fraction} of the GPU"
        return MemoryUse(total=total, weights=weight_bytes), where
    total = weight_bytes + int(config.cpu_memory_gb * 1e9)
    return MemoryUse(total=total, weights=weight_bytes), "the weights and cpu_memory_gb"


def _planned(
    config: EngineConfig,
    model: Decoder,
    use: MemoryUse,
    where: str,
    *,
    state: int,
    kv: int,
    context_bytes: Callable[[int], int],
) -> list[str]:
    """How the engine would share the memory out. `state`: bytes per slot, `kv`: bytes per token, `context_bytes`: as
    for `plan_pools`."""
    import torch

    from ...engine.execution.block_tables import BlockTables
    from ...engine.execution.sampler import Sampler
    from ...engine.startup.measuring import context_length, plan_pools

    max_model_len = context_length(config, model.spec.max_model_len)
    table = Sampler.bytes_per_slot(model.spec.vocab_size)
    snapshot_bytes = model.spec.state_bytes_per_sequence(getattr(torch, config.saved_state_dtype).itemsize)
    try:
        plan = plan_pools(
            config,
            use,
            max_model_len=max_model_len,
            state_bytes_per_slot=state + table,
            kv_bytes_per_token=kv,
            snapshot_bytes=snapshot_bytes,
            context_bytes=context_bytes,
        )
    except ConfigError as error:
        return [f"  does not fit in {size(use.total)} ({where}): {error}"]
    positions = model.position_bytes(plan.max_model_len)
    use = msgspec.structs.replace(use, weights=use.weights + positions)
    use.other = context_bytes(plan.max_model_len) - positions
    use.state = plan.num_state_slots * state
    use.sampler = Sampler.bytes_for(plan.num_state_slots, model.spec.vocab_size)
    use.kv = plan.num_kv_blocks * config.block_size * kv
    use.kv += plan.num_state_slots * BlockTables.bytes_per_slot(plan.max_model_len, config.block_size)
    use.snapshots = plan.num_snapshots * snapshot_bytes
    return [
        f"  planned split      {split(use)}",
        f"                     for {plan.num_state_slots} sequences at once and "
        f"{plan.num_kv_blocks * config.block_size:,} tokens of KV cache",
        f"  prefix cache       {snapshots(plan.num_snapshots, plan.num_host_snapshots, use.snapshots)}",
        "                     (on a GPU workspace and CUDA graphs are measured at start and come off these)",
        *drafts("drafts            ", config.speculative_tokens, config.speculative_max_rows),
        *(f"  note               {note}" for note in plan.notes),
    ]
