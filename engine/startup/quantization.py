"""The setting `quantization` as formats of weights, and whether a model could be given them."""

from __future__ import annotations

import torch

from ...configs.schema import EngineConfig
from ...models.decoder import Decoder
from ...models.layers.build import matrices_of
from ...models.loading.weight_format import Part, WeightFormat
from ..errors import ConfigError


def wanted_formats(config: EngineConfig) -> dict[Part, WeightFormat]:
    """What plain matrices of each part are quantised to."""
    of_kind = {
        "fp8": WeightFormat("fp8", (128, 128)),
        "int8": WeightFormat("int8", (1, config.quantization_group), torch.bfloat16),
        "int4": WeightFormat("int4", (1, config.quantization_group), torch.bfloat16),
    }
    return {part: of_kind[kind] for part, kind in config.quantization.items() if kind != "none"}


def check_quantization(config: EngineConfig, model: Decoder) -> None:
    """Raise `ConfigError` where the setting changes nothing: the model has no such part, or a checkpoint has all of it
    in another format already."""
    kinds: dict[Part, set[str]] = {}
    for part, weight in matrices_of(model):
        kinds.setdefault(part, set()).add(weight.format)
    for part, kind in config.quantization.items():
        if part not in kinds:
            if config.quantizes_all_alike:
                continue
            raise ConfigError(
                f"quantization = {config.quantization}: the model has no {part}, only {' and '.join(kinds)}; leave "
                f"{part} out"
            )
        if kind not in ("none", *kinds[part]):
            told = " and ".join(sorted(kinds[part]))
            raise ConfigError(
                f"quantization = {config.quantization}: the checkpoint has its {part} in {told} already, and weights "
                f"are quantised once; leave {part} out, or take the checkpoint of this model in bfloat16"
            )
