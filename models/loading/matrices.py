"""Matrices that are quantised in the files, in the model or in both: read by rows, decoded, and stored in their places.

A matrix whose format the model shares keeps its bits. Any other is dequantised in float32; from there it is rounded to
the dtype of a plain parameter, or to the format of a quantised one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.bundles import Weight
from ...kernels.quantised import quantise_fp8, quantise_int4, quantise_int8
from .formats.encoded import Encoded, Tensors
from .header import StoredTensor
from .target import Place, Target

CHUNK_ITEMS = 1 << 21  # of a matrix in one piece; a reader's working memory is some 8 times as many numbers in float32


class Stretch(NamedTuple):
    """Rows of a piece, and the place that takes them."""

    start: int  # counted from the piece's first row
    place: Place


@dataclass(frozen=True, slots=True)
class MatrixPiece:
    """Rows of a matrix that one reader moves at a time."""

    encoded: Encoded
    start: int
    count: int
    stretches: list[Stretch]

    @property
    def device(self) -> torch.device:
        return self.stretches[0].place.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, StoredTensor]:
        """The rows to read of each of the matrix's tensors, by role."""
        return {role: part.cut(self.start, self.count) for role, part in self.encoded.tensors.items()}


def matrix_pieces(encoded: Encoded, target: Target) -> Iterator[MatrixPiece]:
    """The pieces of a matrix, or of E experts one after another."""
    assert target.cut is None and not target.plus, "no rank reads a part of a quantised matrix yet"
    if len(encoded.shape) == 2:
        yield from _pieces(encoded, target.views)
        return
    for index in range(encoded.shape[0]):
        yield from _pieces(encoded.expert(index), [_of_expert(view, index) for view in target.views])


def _of_expert(view: Place, index: int) -> Place:
    return view.expert(index) if isinstance(view, Weight) else view[index]


def _pieces(encoded: Encoded, views: tuple[Place, ...] | list[Place]) -> Iterator[MatrixPiece]:
    num_rows, columns = encoded.shape
    block_rows = max(view.block[0] if isinstance(view, Weight) else 1 for view in views)
    step = math.lcm(encoded.step, block_rows) or num_rows
    count = max(step, CHUNK_ITEMS // columns // step * step)
    for start in range(0, num_rows, count):
        rows = min(count, num_rows - start)
        yield MatrixPiece(encoded, start, rows, list(_stretches(start, rows, views)))


def _stretches(start: int, count: int, views: tuple[Place, ...] | list[Place]) -> Iterator[Stretch]:
    """The parts of the views, which lie one below another, within `count` rows from `start` on."""
    first = 0
    for view in views:
        size = view.shape[-2]
        low, high = max(start, first), min(start + count, first + size)
        if low < high:
            part = view.rows(low - first, high - low) if isinstance(view, Weight) else view[low - first : high - first]
            yield Stretch(low - start, part)
        first += size


def store(piece: MatrixPiece, tensors: Tensors) -> None:
    """Decode the rows that `tensors` hold, and fill their places."""
    weight = piece.encoded.decode(tensors)
    whole: Tensor | None = None
    for start, place in piece.stretches:
        count = place.shape[-2]
        if isinstance(place, Weight) and place.format == weight.format and place.block == weight.block:
            _copy(weight.rows(start, count), place)
            continue
        if whole is None:
            whole = weight.dequantised(torch.float32)
        rows = whole[start : start + count]
        if isinstance(place, Weight):
            _quantise(rows, place)
        else:
            place.copy_(rows)


def _copy(source: Weight, place: Weight) -> None:
    assert source.scale is not None and place.scale is not None
    assert (source.zero is None) == (place.zero is None)
    place.data.copy_(source.data)
    place.scale.copy_(source.scale)
    if place.zero is not None and source.zero is not None:
        place.zero.copy_(source.zero)


def _quantise(matrix: Tensor, place: Weight) -> None:
    """Round a matrix to the format of its place."""
    assert place.scale is not None and place.zero is None
    if place.format == "fp8":
        data, scale = quantise_fp8(matrix)
    elif place.format == "int8":
        data, scale = quantise_int8(matrix, place.block[1])
    else:
        data, scale = quantise_int4(matrix, place.block[1])
    place.data.copy_(data)
    place.scale.copy_(scale)
