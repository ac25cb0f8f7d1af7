"""The text of `leyden info`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...configs.schema import EngineConfig
from .banner import count, drafts, layers, replaced, size, snapshots, split, weights

if TYPE_CHECKING:
    from ...engine.startup.forecast import Forecast


def describe_model(config: EngineConfig, memory_gb: float | None) -> str:
    """Layers, parameters, bytes per sequence and token, the planned split, and how many sequences fit, for `memory_gb`
    or for the memory that the settings give. Raises `CheckpointError` or `ConfigError`."""
    from ...engine.startup.forecast import forecast

    told = forecast(config, memory_gb)
    served, spec = told.served, told.served.spec
    dtype, held = str(served.dtype).removeprefix("torch."), (served.weight_bytes, served.quantised_bytes)
    lines = [
        f"{served.folder}",
        *replaced(config, 18),
        f"  architecture       {spec.architecture}",
        f"  layers             {layers(spec.layer_counts)}",
        f"  parameters         {count(served.num_parameters)}, {size(served.weight_bytes)}: {weights(dtype, *held)}",
        f"  context            {spec.max_model_len:,} tokens",
        f"  state per sequence {size(served.state_bytes_per_slot)} in {config.state_dtype}, whatever its length",
        f"  KV cache per token {size(served.kv_bytes_per_token)}",
        *_planned(config, told),
        f"  sequences that fit beside the weights in {size(told.share)} ({told.origin}):",
        *(f"    {length:>9,} tokens each: {number:,}" for length, number in told.num_fitting.items()),
    ]
    return "\n".join(lines)


def _planned(config: EngineConfig, told: Forecast) -> list[str]:
    """How the engine would share the memory out, or why it would not start."""
    plan, use = told.plan, told.use
    if plan is None or use is None:
        return [f"  does not fit in {size(told.share)} ({told.origin}): {told.refusal}"]
    return [
        f"  planned split      {split(use)}",
        f"                     for {plan.num_state_slots} sequences at once and "
        f"{plan.num_kv_blocks * config.block_size:,} tokens of KV cache",
        f"  prefix cache       {snapshots(plan.num_snapshots, plan.num_host_snapshots, use.snapshots)}",
        "                     (on a GPU workspace and CUDA graphs are measured at start and come off these)",
        *drafts("drafts            ", config.speculative_tokens, config.speculative_max_rows),
        *(f"  note               {note}" for note in plan.notes),
    ]
