"""The published formats by their `quant_method`.

To add one: a module here with a class as `Published`, and a line in `METHODS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from ...errors import CheckpointError
from ..weight_format import PLAIN, WeightFormat
from .awq import Awq
from .compressed_tensors import CompressedTensors
from .config import QuantizationConfig, read_quantization_config
from .encoded import Encoded, StoredMatrix, encode_plain
from .fp8 import FineGrainedFp8
from .gptq import Gptq
from .modelopt import ModelOpt

# Lists of modules that a format leaves as they are, and keys of GPTQ's `dynamic` that do.
IGNORE_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")


class Published(Protocol):
    """How one format stores a matrix. `encode` decides by the tensors that exist."""

    method: ClassVar[str]

    def encode(self, matrix: StoredMatrix) -> Encoded:
        """Raises `CheckpointError` for a tensor that the format does not have, or of a wrong shape."""

    @property
    def declared(self) -> WeightFormat:
        """The format that holds most matrices, as the config alone tells."""


METHODS: dict[str, Callable[[QuantizationConfig], Published]] = {
    "fp8": FineGrainedFp8.read,
    "compressed-tensors": CompressedTensors.read,
    "gptq": Gptq.read,
    "awq": Awq.read,
    "modelopt": ModelOpt.read,
    "modelopt_fp4": ModelOpt.read,
}


@dataclass(frozen=True)
class Quantization:
    """The quantisation of a checkpoint; None = its config has none."""

    published: Published | None = None
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> Quantization:
        """Raises `CheckpointError` for a format that is not read."""
        config = read_quantization_config(folder)
        if config is None:
            return cls()
        if config.method not in METHODS:
            raise CheckpointError(
                f"{config.file}: quant_method = {config.method!r} is not supported (supported: {', '.join(METHODS)}); "
                "take the checkpoint of this model in bfloat16, or in one of these"
            )
        patterns = config.get("dynamic", {}) if config.method == "gptq" else {}
        dynamic = tuple("re:" + key[2:] for key in patterns if key.startswith("-:"))
        return cls(METHODS[config.method](config), config.texts(*IGNORE_LISTS) + dynamic)

    def encode(self, matrix: StoredMatrix) -> Encoded:
        """How a matrix of the checkpoint is read. Raises `CheckpointError`."""
        if matrix.is_plain and not matrix.first.is_quantised:
            return encode_plain(matrix)
        if self.published is None:
            first = matrix.first
            raise CheckpointError(
                f"{first.path}: tensor {first.name} of shape {list(first.shape)} belongs to a quantised matrix, but "
                "config.json has no quantization_config to tell its format"
            )
        return self.published.encode(matrix)

    def declared(self, spellings: list[str]) -> WeightFormat:
        """The format of a module, by the config alone. `spellings`: its names; an entry of an ignore list may have
        any of them, or a part between dots."""
        if self.published is None or any(_names(entry, name) for entry in self.ignored for name in spellings):
            return PLAIN
        return self.published.declared


def _names(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return f".{entry.replace('*', '').strip('.')}." in f".{module}."
