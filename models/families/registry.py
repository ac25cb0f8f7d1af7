"""From the `architectures` of a config.json to the function that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError
from ..specs import ModelSpec
from . import minimax

Parse = Callable[[Mapping[str, Any], str], ModelSpec]  # of a config.json and its architecture

FAMILIES: dict[str, Parse] = {
    "MiniMaxForCausalLM": minimax.parse_hf,
    "MiniMaxText01ForCausalLM": minimax.parse_original,
    "MiniMaxM1ForCausalLM": minimax.parse_original,
}


def find_architecture(config: Mapping[str, Any]) -> str:
    """The architecture of a config.json. An unknown one is an error that lists the known ones."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name in FAMILIES:
            return name
    raise CheckpointError(
        f"config.json: unknown architecture ({names!r}, model_type {config.get('model_type')!r}); "
        f"supported: {', '.join(FAMILIES)}"
    )
