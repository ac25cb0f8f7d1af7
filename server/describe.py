"""What a person reads at start-up and from `leyden info`."""

from __future__ import annotations

from ..configs.schema import EngineConfig
from ..engine.messages import EngineInfo

CONTEXTS = (1024, 8192, 32768, 131072, 1048576)


def banner(info: EngineInfo, *, name: str, address: str, needs_key: bool) -> str:
    """The lines printed once the server answers."""
    state_bytes = info.num_state_slots * info.state_bytes_per_slot
    kv_tokens = info.num_kv_blocks * info.block_size
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    lines = [
        f"Leyden serves {name} ({info.architecture}, {_count(info.num_parameters)} parameters)",
        f"  layers    {info.num_linear_layers} lightning, {info.num_full_layers} softmax",
        f"  backend   {info.linear_backend} ({info.kernels} kernels) on {info.device} ({info.device_name})",
        f"  numbers   {info.dtype} weights, {info.state_dtype} state",
        f"  memory    {_size(info.weight_bytes)} weights, {_size(state_bytes)} state, "
        f"{_size(kv_tokens * info.kv_bytes_per_token)} KV cache",
        f"  capacity  {info.num_state_slots} sequences at once, {kv_tokens:,} tokens of KV cache, "
        f"context {info.max_model_len:,}",
        *(f"  note      {note}" for note in info.notes),
        f"  address   {address}",
        "",
        f"  curl -N {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\",
        f'    -d \'{{"model": "{name}", "stream": true, "messages": '
        '[{"role": "user", "content": "Tell me a short story about a fox."}]}\'',
    ]
    return "\n".join(lines)


def describe_model(config: EngineConfig, memory_gb: float | None) -> str:
    """Layers, parameters, bytes per sequence and token, and how many sequences fit. Loads no weights.

    Raises `CheckpointError` or `ConfigError`.
    """
    import torch

    from ..engine.model_runner import pick_device, pick_dtype
    from ..kernels import load
    from ..models.backends import LINEAR_BACKENDS
    from ..models.checkpoint import read_config, resolve
    from ..models.registry import FAMILIES

    folder = resolve(config.model, config.revision, weights=False)
    model_config = read_config(folder)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, model_config, device)
    kernels = load("torch")
    backend = LINEAR_BACKENDS[config.linear_backend](kernels)
    model = FAMILIES[model_config.architecture].module()(
        model_config, kernels, backend, device=torch.device("meta"), dtype=dtype
    )
    weight_bytes = sum(p.nbytes for p in model.parameters())
    state_dtype = getattr(torch, config.state_dtype)
    state = model_config.state_bytes_per_sequence(state_dtype.itemsize)
    state += model_config.ring_bytes_per_sequence(backend.ring_size, dtype.itemsize)
    kv = model_config.kv_bytes_per_token(dtype.itemsize)
    lines = [
        f"{folder}",
        f"  architecture       {model_config.architecture}",
        f"  layers             {len(model_config.linear_layers)} lightning, {len(model_config.full_layers)} softmax",
        f"  parameters         {_count(sum(p.numel() for p in model.parameters()))} ({_size(weight_bytes)} in "
        f"{str(dtype).removeprefix('torch.')})",
        f"  context            {model_config.max_model_len:,} tokens",
        f"  state per sequence {_size(state)} in {config.state_dtype}, whatever its length",
        f"  KV cache per token {_size(kv)}",
    ]
    memory, where = _memory(config, memory_gb, device)
    left = memory - (weight_bytes if device.type == "cuda" or memory_gb is not None else 0)
    lines.append(f"  sequences that fit beside the weights in {_size(memory)} ({where}):")
    for length in sorted({min(context, model_config.max_model_len) for context in CONTEXTS}):
        lines.append(f"    {length:>9,} tokens each: {max(0, left // (state + kv * length)):,}")
    return "\n".join(lines)


def _memory(config: EngineConfig, memory_gb: float | None, device: object) -> tuple[int, str]:
    import torch

    if memory_gb is not None:
        return int(memory_gb * 1e9), "as given"
    if isinstance(device, torch.device) and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(total * config.memory_fraction), f"memory_fraction {config.memory_fraction} of the GPU"
    return int(config.cpu_memory_gb * 1e9), "cpu_memory_gb, weights apart"


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
