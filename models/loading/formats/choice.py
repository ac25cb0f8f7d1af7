"""Which format a model holds each of its matrices in: that of the checkpoint, or one that a setting asks for."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import WeightFormatError
from ..names import Names
from ..stored import read_stored
from ..weight_format import PLAIN, Part, WeightFormat
from .published import Quantization

ANY_EXPERT = re.compile(r"\.experts\.\d+\.")


def _nothing_stored(name: str) -> WeightFormat | None:
    return None


@dataclass(frozen=True)
class Formats:
    """`stored`: the format that holds a matrix of the checkpoint without loss, by its canonical name; None = the
    checkpoint has no such tensor. `wanted`: what plain matrices of a part are quantised to."""

    stored: Callable[[str], WeightFormat | None] = _nothing_stored
    wanted: Mapping[Part, WeightFormat] = field(default_factory=dict)

    @classmethod
    def of_files(cls, folder: Path, names: Names, wanted: Mapping[Part, WeightFormat]) -> Formats:
        """Those of a checkpoint whose weights are there, by their headers. Raises `CheckpointError`."""
        stored = read_stored(folder, names, set())
        quantization = Quantization.of(folder)
        return cls({matrix.name: quantization.encode(matrix).format for matrix in stored.matrices}.get, wanted)

    @classmethod
    def of_config(cls, folder: Path, names: Names, wanted: Mapping[Part, WeightFormat]) -> Formats:
        """Those that a config.json declares, for a model whose weights are not read. Raises `CheckpointError`."""
        quantization = Quantization.of(folder)

        @functools.cache
        def of_module(module: str) -> WeightFormat:
            return quantization.declared([module, names.as_spelt(f"{module}.weight", ()).removesuffix(".weight")])

        return cls(lambda name: of_module(ANY_EXPERT.sub(".experts.0.", name).removesuffix(".weight")), wanted)

    def choose(self, part: Part, names: Iterable[str], pieces: Sequence[int], columns: int) -> WeightFormat:
        """The format of one matrix of the model. `names`: canonical, of the stored tensors that fill it, or may;
        `pieces`: its rows between two places where another stored tensor, or another run of its rows, begins.

        The format of the stored tensors where all have the same, and the matrix can be cut so. Otherwise the matrix is
        plain, or what the setting wants of plain ones. Raises `WeightFormatError` if it cannot be that.
        """
        found = {stored for name in names if (stored := self.stored(name)) is not None}
        kept = found.pop() if len(found) == 1 else PLAIN
        if kept.kind != "plain" and kept.refusal(pieces, columns) is None:
            return kept
        wanted = self.wanted.get(part, PLAIN)
        if reason := wanted.refusal(pieces, columns):
            name = next(iter(names))
            raise WeightFormatError(
                f"quantization: {name} of the part {part!r} cannot be {wanted.kind}, since {reason}; "
                f"{wanted.remedy(pieces, columns)}"
            )
        return wanted
