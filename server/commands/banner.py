"""The lines that `leyden serve` prints once it answers, and the phrases that it shares with `leyden info`."""

from __future__ import annotations

import json
import shlex
from typing import Any

from ...configs.schema import EngineConfig
from ...engine.messages import EngineInfo, MemoryUse

KINDS = {  # kinds of memory whose own name is short
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
    """The lines printed once the server answers. The last two are a command to try.

    `can_chat`: the model has a chat template. `config`: the settings, of which the banner names the session folder and
    the files that replace files of the checkpoint.
    """
    kv_tokens = info.num_kv_blocks * info.block_size
    lines = [
        f"Leyden serves {name} ({info.architecture}, {count(info.num_parameters)} parameters)",
        f"  layers    {layers(info.layer_counts)}",
        f"  backend   {info.linear_backend} ({info.kernels} kernels) on {info.device} ({info.device_name})",
        f"  numbers   {weights(info.dtype, info.weight_bytes, info.quantised_bytes)}, {info.state_dtype} state",
        f"  memory    {split(info.memory)}",
        f"  capacity  {info.num_state_slots} sequences at once, {kv_tokens:,} tokens of KV cache, "
        f"context {info.max_model_len:,}",
        f"  prefixes  {snapshots(info.num_snapshots, info.num_host_snapshots, info.memory.snapshots)}",
        *drafts("drafts   ", info.speculative_tokens, info.speculative_max_rows),
        *([f"  sessions  kept in {config.session_folder}"] if config and config.session_folder else ()),
        *(replaced(config, 9) if config else ()),
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


def layers(counts: dict[str, int]) -> str:
    """'6 lightning, 2 softmax', of the numbers by kind."""
    return ", ".join(f"{number} {kind}" for kind, number in counts.items())


def weights(dtype: str, num_bytes: int, quantised: dict[str, int]) -> str:
    """'bfloat16 weights', or the bytes of each quantised kind and of the rest."""
    if not quantised:
        return f"{dtype} weights"
    kinds = [f"{kind} ({size(held)})" for kind, held in quantised.items()]
    return f"{', '.join(kinds)}, other weights {dtype} ({size(num_bytes - sum(quantised.values()))})"


def snapshots(num: int, num_on_host: int, num_bytes: int) -> str:
    """Room of the prefix cache: `num` snapshots take `num_bytes` of the device; a snapshot on the host is as large."""
    if not num:
        return "no snapshots"
    each = num_bytes // num
    on_host = f", and {num_on_host:,} on the host, {size(num_on_host * each)}" if num_on_host else ""
    return f"{num:,} snapshots of {size(each)}, {size(num_bytes)}{on_host}"


def replaced(config: EngineConfig, width: int) -> list[str]:
    """A line for each file or folder that replaces one of the checkpoint."""
    given = {"tokenizer": config.tokenizer, "template": config.chat_template}
    return [f"  {name:{width}} {path}" for name, path in given.items() if path is not None]


def drafts(name: str, num_tokens: int, max_rows: int) -> list[str]:
    """A line on speculative decoding; none where it is off."""
    line = f"  {name} up to {num_tokens} per sequence and step, while at most {max_rows} sequences decode"
    return [line] if num_tokens else []


def split(use: MemoryUse) -> str:
    """Bytes by kind of use, and the free rest."""
    parts = [f"{size(num_bytes)} {KINDS.get(kind, kind)}" for kind, num_bytes in use.by_kind().items() if num_bytes]
    return f"{', '.join(parts)}; {size(max(0, use.unassigned))} free of {size(use.total)}"


def size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count(number: float) -> str:
    for unit in ("", "K", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.4g}B"
