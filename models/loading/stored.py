"""The tensors of a checkpoint's files as matrices, by their canonical names."""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .files import find_files
from .formats.encoded import WEIGHT, StoredMatrix, split_role
from .header import StoredTensor, read_header
from .names import Names

logger = logging.getLogger("leyden.models")

# Scales of activations, keys and values beside quantised matrices: activations are computed in the model's dtype here.
OF_ACTIVATIONS = re.compile(r"[._](input|output|k|v|q|kv_cache)_(scale|zero_point|global_scale)$")


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, by its headers alone."""

    folder: Path
    names: list[str]  # of all tensors, as they are spelt
    matrices: list[StoredMatrix]  # and any other wanted tensors, each as a matrix with the role "weight"
    left_out: Counter[str]  # tensors by the part of the model that is not served

    @property
    def is_quantised(self) -> bool:
        return any(not matrix.is_plain or matrix.first.is_quantised for matrix in self.matrices)

    def log_left_out(self) -> None:
        if self.left_out:
            counts = ", ".join(f"{count} of {part}" for part, count in self.left_out.items())
            logger.info("%s: tensors left out, whose parts are not served: %s", self.folder, counts)


def read_stored(folder: Path, names: Names, ignored: set[str]) -> Stored:
    """Group the tensors of the files. `ignored`: canonical names of matrices that are passed over. Raises
    `CheckpointError`."""
    spelt: list[str] = []
    grouped: dict[tuple[str, str], StoredTensor] = {}
    repeated: list[StoredMatrix] = []
    left_out: Counter[str] = Counter()
    for tensor in (tensor for path in find_files(folder) for tensor in read_header(path)):
        spelt.append(tensor.name)
        canonical = names.canonical(tensor.name)
        name, role = split_role(canonical)
        if names.is_ignored(canonical) or name in ignored:
            continue
        if part := names.part_left_out(canonical):
            left_out[part] += 1
        elif OF_ACTIVATIONS.search(canonical):
            left_out["the scales of activations"] += 1
        elif (name, role) in grouped:
            repeated.append(StoredMatrix(name, {role: tensor}))
        else:
            grouped[name, role] = tensor
    matrices: dict[str, dict[str, StoredTensor]] = {}
    for (name, role), tensor in grouped.items():
        matrices.setdefault(name, {})[role] = tensor
    found = [StoredMatrix(name, _weight_first(tensors)) for name, tensors in matrices.items()]
    return Stored(folder, spelt, found + repeated, left_out)


def _weight_first(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The largest tensor first, which names the matrix in messages."""
    return dict(sorted(tensors.items(), key=lambda item: (item[0] != WEIGHT, -item[1].nbytes)))
