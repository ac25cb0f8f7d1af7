"""AWQ: `x.qweight` int32 [K, N / 8], `x.scales` [K / g, N], `x.qzeros` int32 [K / g, N / 8]; item = (q - zero) * scale.

Eight rows share a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ....kernels.bundles import Weight
from ..weight_format import PLAIN, WeightFormat
from .config import QuantizationConfig
from .encoded import Encoded, StoredMatrix, TensorRows, Tensors, check_shape, refuse_dtype
from .four_bits import integers, unpack

ITEMS, ZEROS, SCALES = "qweight", "qzeros", "scales"
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of rows 0 to 7 in their word, as nibbles from the lowest on


@dataclass(frozen=True)
class Awq:
    method: ClassVar[str] = "awq"

    group_size: int  # -1: all of a row

    @classmethod
    def read(cls, config: QuantizationConfig) -> Awq:
        """Raises `CheckpointError`."""
        config.must_be("bits", 4)
        config.must_be("version", "gemm")
        config.must_be("zero_point", True)
        return cls(config.integer("group_size"))

    def encode(self, matrix: StoredMatrix) -> Encoded:
        """Raises `CheckpointError`."""
        matrix.take(self.method, (ITEMS, ZEROS, SCALES))
        items, scales = matrix.tensors[ITEMS], matrix.tensors[SCALES]
        if items.dtype != torch.int32:
            raise refuse_dtype(items, self.method)
        columns, rows = items.shape[0], 8 * items.shape[1]
        group = self.group_size if self.group_size > 0 else columns
        check_shape(scales, (-(-columns // group), rows), items)
        check_shape(matrix.tensors[ZEROS], (scales.shape[0], rows // 8), items)
        held = WeightFormat("int4", (1, group if group < columns else 0), scales.dtype, has_zero=True)
        format = PLAIN if held.refusal((rows,), columns) else held
        whole = {role: TensorRows(stored, 0) for role, stored in matrix.tensors.items()}
        return Encoded(items, (rows, columns), format, whole, partial(_decode, group=group), 0)

    @property
    def declared(self) -> WeightFormat:
        return WeightFormat("int4", (1, max(0, self.group_size)), torch.float16, has_zero=True)


def _decode(tensors: Tensors, *, group: int) -> Weight:
    items, zero = (_in_order(unpack(tensors[role], 4, 1)).t() for role in (ITEMS, ZEROS))
    return integers(items, tensors[SCALES].t(), zero.short() - 8, 4)


def _in_order(items: Tensor) -> Tensor:
    """[.., N] in the order of the nibbles -> in the order of the rows."""
    return items.unflatten(-1, (-1, 8))[..., list(PLACES)].flatten(-2)
