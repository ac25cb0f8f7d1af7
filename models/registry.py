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

    parse: Callable[[Mapping[str, Any]], ModelConfig]
    module: Callable[[], type[MiniMaxForCausalLM]]  # called late: reading a config needs no torch


def _minimax() -> type[MiniMaxForCausalLM]:
    from .minimax import MiniMaxForCausalLM

    return MiniMaxForCausalLM


FAMILIES: dict[str, Family] = {
    "MiniMaxForCausalLM": Family(minimax_config.parse_hf, _minimax),
    "MiniMaxText01ForCausalLM": Family(minimax_config.parse_original, _minimax),
    "MiniMaxM1ForCausalLM": Family(minimax_config.parse_original, _minimax),
}


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. An unknown architecture is an error that lists the known ones."""
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    asked = ", ".join(map(str, names)) or "none"
    raise CheckpointError(
        f"config.json: unknown architecture ({asked}, model_type {config.get('model_type')!r}); "
        f"supported: {', '.join(FAMILIES)}"
    )
