"""From a config.json to a `ModelSpec`, by its `architectures`. Needs no torch.

To add a family: a module here with `read(config, architecture) -> ModelSpec`, which refuses every field that it cannot
honour, and its `NAMES`; then a line in `FAMILIES`. `models.decoder` builds any `ModelSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..loading.checkpoint import GENERATION_FILE, read_generation_config, read_json
from ..loading.names import Names
from ..specs import ModelSpec
from . import minimax, qwen, qwen3_5, qwen3_next, ring_linear
from .fields import token_ids


class Family(NamedTuple):
    """How one architecture's config.json is read, and how its files spell the tensors' names."""

    read: Callable[[Mapping[str, Any], str], ModelSpec]  # of a config.json and its architecture
    names: Callable[[ModelSpec], Names]  # of a model, since a spelling may depend on the layer's kind


FAMILIES: dict[str, Family] = {
    "MiniMaxForCausalLM": Family(minimax.read_hf, minimax.names),
    "MiniMaxText01ForCausalLM": Family(minimax.read_original, minimax.names),
    "MiniMaxM1ForCausalLM": Family(minimax.read_original, minimax.names),
    "BailingMoeLinearV2ForCausalLM": Family(ring_linear.read, ring_linear.names),
    "Qwen3NextForCausalLM": Family(qwen3_next.read, qwen.names),
    "Qwen3_5ForCausalLM": Family(qwen3_5.read, qwen.names),
    "Qwen3_5MoeForCausalLM": Family(qwen3_5.read, qwen.names),
    "Qwen3_5ForConditionalGeneration": Family(qwen3_5.read, qwen.names),
    "Qwen3_5MoeForConditionalGeneration": Family(qwen3_5.read, qwen.names),
}


def read_config(folder: Path) -> ModelSpec:
    """The model's spec, with the stop ids of generation_config.json joined in. Raises `CheckpointError`."""
    spec = from_hf(read_json(folder / "config.json"))
    more = token_ids(read_generation_config(folder).get("eos_token_id"), GENERATION_FILE)
    return replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + more)))


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json. Raises `CheckpointError` for an unknown architecture or a field that the family cannot
    honour."""
    architecture = _architecture(config)
    return FAMILIES[architecture].read(config, architecture)


def names_of(spec: ModelSpec) -> Names:
    """The spellings of the model's checkpoints."""
    return FAMILIES[spec.architecture].names(spec)


def _architecture(config: Mapping[str, Any]) -> str:
    """The first known architecture of a config.json. Raises `CheckpointError`, which lists the known ones."""
    names = config.get("architectures")
    if not names:
        raise CheckpointError(
            "config.json: architectures is missing, which names the model's class; add it as the model's authors have "
            f'it, such as "architectures": ["MiniMaxForCausalLM"]; supported: {", ".join(FAMILIES)}'
        )
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name in FAMILIES:
            return name
    raise CheckpointError(
        f"config.json: unknown architecture ({names!r}, model_type {config.get('model_type')!r}); "
        f"supported: {', '.join(FAMILIES)}"
    )
