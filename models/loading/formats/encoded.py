"""A quantised matrix in a checkpoint's files: its tensors by their roles, and how rows of it become a `Weight`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ....kernels.bundles import Weight
from ...errors import CheckpointError
from ..header import StoredTensor
from ..weight_format import PLAIN, WeightFormat

Tensors = dict[str, Tensor]  # by role

# A role is the end of a tensor's name. `weight` stands for the matrix's own name, which experts in one tensor lack.
WEIGHT = "weight"
SUFFIXES = ("_packed", "_scale_inv", "_global_scale", "_scale_2", "_scale", "_zero_point", "_g_idx", "_shape")
OTHER_ROLES = ("qweight", "qzeros", "scales", "g_idx")


def split_role(name: str) -> tuple[str, str]:
    """(the name of the matrix, the role) of a tensor: ("x.weight", "weight_scale") of x.weight_scale, ("x.weight",
    "qzeros") of x.qzeros. The role of any other tensor is "weight"."""
    stem, _, last = name.rpartition(".")
    if last in OTHER_ROLES:
        return f"{stem}.{WEIGHT}", last
    for suffix in SUFFIXES:
        if last.endswith(suffix) and last != suffix:
            return name.removesuffix(suffix), WEIGHT + suffix
    return name, WEIGHT


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """The tensors of one matrix [N, K], or of E experts. `name` is canonical."""

    name: str
    tensors: Mapping[str, StoredTensor]  # by role

    @property
    def is_plain(self) -> bool:
        return self.tensors.keys() == {WEIGHT}

    @property
    def first(self) -> StoredTensor:
        """The tensor that names the matrix in messages."""
        return next(iter(self.tensors.values()))

    def take(self, method: str, needed: Collection[str], optional: Collection[str] = ()) -> None:
        """Raises `CheckpointError` if a role is missing or unknown in this method."""
        for role, stored in self.tensors.items():
            if role not in needed and role not in optional:
                known = ", ".join((*needed, *optional))
                raise CheckpointError(
                    f"{stored.path}: tensor {stored.name} of shape {list(stored.shape)} is no part of a matrix that "
                    f"quantization_config calls {method!r} (parts: {known})"
                )
        for role in needed:
            if role not in self.tensors:
                raise CheckpointError(
                    f"{self.first.path}: tensor {self.first.name} of shape {list(self.first.shape)} comes without its "
                    f"{role}, which a matrix needs that quantization_config calls {method!r}"
                )


class TensorRows(NamedTuple):
    """A tensor of a matrix: one of its rows belongs to `of` rows of the matrix; 0 = the tensor is read whole."""

    stored: StoredTensor
    of: int = 1

    def cut(self, start: int, count: int) -> StoredTensor:
        """The stored rows that belong to `count` rows of the matrix."""
        if not self.of:
            return self.stored
        first = start // self.of
        return self.stored.rows(first, min(-(-(start + count) // self.of), self.stored.shape[0]) - first)


@dataclass(frozen=True, slots=True)
class Encoded:
    """How a matrix is read. `decode` makes a `Weight` of a run of rows, on the device of the tensors that it gets."""

    stored: StoredTensor  # names the matrix in messages
    shape: tuple[int, ...]  # [N, K], or [E, N, K]
    format: WeightFormat  # holds the matrix without loss; PLAIN: `decode` gives its items in float32
    tensors: Mapping[str, TensorRows]  # by role
    decode: Callable[[Tensors], Weight]
    step: int = 1  # runs of rows begin at multiples of it; 0 = all rows are read at once

    def expert(self, index: int) -> Encoded:
        """One of E experts. A tensor that is read whole has a row for each."""
        tensors = {role: part._replace(stored=part.stored.row(index)) for role, part in self.tensors.items()}
        return replace(self, shape=self.shape[1:], tensors=tensors)


def encode_plain(matrix: StoredMatrix) -> Encoded:
    """A matrix that is not quantised."""
    stored = matrix.tensors[WEIGHT]
    return Encoded(stored, stored.shape, PLAIN, {WEIGHT: TensorRows(stored)}, _decode_plain)


def _decode_plain(tensors: Tensors) -> Weight:
    return Weight(tensors[WEIGHT])


def check_shape(stored: StoredTensor, expected: tuple[int, ...], beside: StoredTensor) -> None:
    """Raises `CheckpointError` if a companion has another shape than the tensor that it is stored beside asks for."""
    if stored.shape != expected:
        raise CheckpointError(
            f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}, but {beside.name} of shape "
            f"{list(beside.shape)} asks for {list(expected)}"
        )


def refuse_dtype(stored: StoredTensor, method: str) -> CheckpointError:
    """The error of a tensor of a dtype that no matrix of this method has."""
    dtype = str(stored.dtype).removeprefix("torch.")
    return CheckpointError(
        f"{stored.path}: tensor {stored.name} of shape {list(stored.shape)} is {dtype}, in which no matrix is stored "
        f"that quantization_config calls {method!r}"
    )
