"""From the `architectures` of a config.json to the code that reads and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import minimax_config
from .config import ModelConfig
from .errors import CheckpointError

if TYPE_CHECKING:
    from .minimax import MiniMaxForCausalLM


@dataclass(frozen=True)
class Family:
    """How one architecture's config.json is read, and the module that runs it."""

    parse: Callable[[Mapping[str, Any], str], ModelConfig]  # of a config.json and its architecture
    module: Callable[[], type[MiniMaxForCausalLM]]  # called late: reading a config needs no torch


def _minimax() -> type[MiniMaxForCausalLM]:
    from .minimax import MiniMaxForCausalLM

    return MiniMaxForCausalLM


FAMILIES: dict[str, Family] = {
    "MiniMaxForCausalLM": Family(minimax_config.parse_hf, _minimax),
    "MiniMaxText01ForCausalLM": Family(minimax_config.parse_original, _minimax),
    "MiniMaxM1ForCausalLM": Family(minimax_config.parse_original, _minimax),
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
