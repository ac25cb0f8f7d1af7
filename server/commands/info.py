"""What a person reads at start-up and from `leyden info`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from ...configs.schema import EngineConfig
from ...engine.errors import ConfigError
from ...engine.memory.plan import MemoryUse
from ...engine.messages import EngineInfo

if TYPE_CHECKING:
    import torch

    from ...models.decoder import Decoder

CONTEXTS = (1024, 8192, 32768, 131072, 1048576)
KINDS = {  # where the kind's own name says less
    "kv": "KV cache",
    "snapshots": "snapshots",
    "sampler": "sampler tables",
    "graphs": "CUDA graphs",
}


def banner(
    info: EngineInfo,
    *,
    name: str,
    address: str,
    needs_key: bool,
    can_chat: bool,
    config: EngineConfig | None = None,
) -> str:
    """The lines printed once the server answers; the last are a command to try. `can_chat`: it has a chat template.
    `config`: the settings, whose session folder is named, and files that replace the checkpoint's own."""
    kv_tokens = info.num_kv_blocks * info.block_size
    lines = [
        f"Leyden serves {name} ({info.architecture}, {_count(info.num_parameters)} parameters)",
        f"  layers    {info.num_linear_layers} lightning, {info.num_full_layers} softmax",
        f"  backend   {info.linear_backend} ({info.kernels} kernels) on {info.device} ({info.device_name})",
        f"  numbers   {info.dtype} weights, {info.state_dtype} state",
        f"  memory    {_split(info.memory)}",
        f"  capacity  {info.num_state_slots} sequences at once, {kv_tokens:,} tokens of KV cache, "
        f"context {info.max_model_len:,}",
        f"  prefixes  {_snapshots(info.num_snapshots, info.num_host_snapshots, info.memory.snapshots)}",
        *_drafts("drafts   ", info.speculative_tokens, info.speculative_max_rows),
        *([f"  sessions  kept in {config.session_folder}"] if config and config.session_folder else ()),
        *(_replaced(config, 9) if config else ()),
        *(f"  note      {note}" for note in info.notes),
        f"  address   {address}",
        f"  browser   {address}/playground to try it, {address}/docs for the API",
        "",
        *_example(name, address, needs_key=needs_key, can_chat=can_chat),
    ]
    return "\n".join(lines)


def _example(name: str, address: str, *, needs_key: bool, can_chat: bool) -> list[str]:
    """A curl command that this server answers, over two lines."""
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    body: dict[str, Any] = {"model": name, "stream": True}
    if can_chat:
        route = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "Tell me a short story about a fox."}]
    else:
        route = "/v1/completions"
        body |= {"max_tokens": 64, "prompt": "Once upon a time"}
    return [
        f"  curl -sN {address}{route}{key} -H 'Content-Type: application/json' \\",
        f"    -d {shlex.quote(json.dumps(body))}",
    ]


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
    from ...models.layers.build import Build
    from ...models.loading.checkpoint import read_config, resolve
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
        check_weights(folder, model.targets(), ignored=model.ignored_names())
    weight_bytes = sum(p.nbytes for p in model.parameters())
    state_dtype = getattr(torch, config.state_dtype)
    state = model_config.state_bytes_per_sequence(state_dtype.itemsize)
    state += model_config.ring_bytes_per_sequence(backend.ring_size, dtype.itemsize)
    kv = model_config.kv_bytes_per_token(dtype.itemsize)
    lines = [
        f"{folder}",
        *_replaced(config, 18),
        f"  architecture       {model_config.architecture}",
        f"  layers             {len(model_config.linear_layers)} lightning, {len(model_config.full_layers)} softmax",
        f"  parameters         {_count(sum(p.numel() for p in model.parameters()))} ({_size(weight_bytes)} in "
        f"{str(dtype).removeprefix('torch.')})",
        f"  context            {model_config.max_model_len:,} tokens",
        f"  state per sequence {_size(state)} in {config.state_dtype}, whatever its length",
        f"  KV cache per token {_size(kv)}",
    ]
    use, where = _share(config, memory_gb, device, weight_bytes)
    once = context_bytes(model, config, device)
    lines += _planned(config, model, use, where, state=state, kv=kv, context_bytes=once)
    lines.append(f"  sequences that fit beside the weights in {_size(use.total)} ({where}):")
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
        return [f"  does not fit in {_size(use.total)} ({where}): {error}"]
    positions = model.position_bytes(plan.max_model_len)
    use = msgspec.structs.replace(use, weights=use.weights + positions)
    use.other = context_bytes(plan.max_model_len) - positions
    use.state = plan.num_state_slots * state
    use.sampler = Sampler.bytes_for(plan.num_state_slots, model.spec.vocab_size)
    use.kv = plan.num_kv_blocks * config.block_size * kv
    use.kv += plan.num_state_slots * BlockTables.bytes_per_slot(plan.max_model_len, config.block_size)
    use.snapshots = plan.num_snapshots * snapshot_bytes
    return [
        f"  planned split      {_split(use)}",
        f"                     for {plan.num_state_slots} sequences at once and "
        f"{plan.num_kv_blocks * config.block_size:,} tokens of KV cache",
        f"  prefix cache       {_snapshots(plan.num_snapshots, plan.num_host_snapshots, use.snapshots)}",
        "                     (on a GPU workspace and CUDA graphs are measured at start and come off these)",
        *_drafts("drafts            ", config.speculative_tokens, config.speculative_max_rows),
        *(f"  note               {note}" for note in plan.notes),
    ]


def _snapshots(num: int, num_on_host: int, num_bytes: int) -> str:
    """The prefix cache's states: `num` take `num_bytes` of the device; those on the host are as large."""
    if not num:
        return "no snapshots"
    each = num_bytes // num
    on_host = f", and {num_on_host:,} on the host, {_size(num_on_host * each)}" if num_on_host else ""
    return f"{num:,} snapshots of {_size(each)}, {_size(num_bytes)}{on_host}"


def _replaced(config: EngineConfig, width: int) -> list[str]:
    """A line for each file or folder that is taken instead of the checkpoint's own."""
    given = {"tokenizer": config.tokenizer, "template": config.chat_template}
    return [f"  {name:{width}} {path}" for name, path in given.items() if path is not None]


def _drafts(name: str, num_tokens: int, max_rows: int) -> list[str]:
    """A line on speculative decoding where it is on."""
    line = f"  {name} up to {num_tokens} per sequence and step, while at most {max_rows} sequences decode"
    return [line] if num_tokens else []


def _split(use: MemoryUse) -> str:
    """What the memory is for, and what is left of it."""
    parts = [f"{_size(num_bytes)} {KINDS.get(kind, kind)}" for kind, num_bytes in use.by_kind().items() if num_bytes]
    return f"{', '.join(parts)}; {_size(max(0, use.unassigned))} free of {_size(use.total)}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _count(number: float) -> str:
    for unit in ("", "K", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.4g}B"
