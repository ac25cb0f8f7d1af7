"""GPTQ: `x.qweight` int32 [K b / 32, N], lowest bits = lowest column; `x.scales` [K / g, N]; `x.qzeros` int32
[K / g, N b / 32]; `x.g_idx` int32 [K].

W[n, k] = (q[k, n] - zero[g, n]) * scale[g, n] with g = g_idx[k]. A file holds zero - 1, unless its checkpoint_format is
gptq_v2. A matrix whose columns were ordered by activation (desc_act) is dequantised by its g_idx.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from ....kernels.bundles import Weight
from ...errors import CheckpointError
from ..header import StoredTensor
from ..weight_format import PLAIN, WeightFormat
from .config import QuantizationConfig
from .encoded import Encoded, StoredMatrix, TensorRows, Tensors, check_shape, refuse_dtype
from .four_bits import integers, unpack

ITEMS, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"


@dataclass(frozen=True)
class Gptq:
    method: ClassVar[str] = "gptq"

    bits: int
    group_size: int  # -1: all of a row
    is_symmetric: bool
    is_ordered: bool
    has_whole_zeros: bool  # a file holds the zeros themselves
    dynamic: tuple[tuple[str, Mapping[str, Any]], ...]  # patterns of modules' names, in order

    @classmethod
    def read(cls, config: QuantizationConfig) -> Gptq:
        """Raises `CheckpointError`."""
        config.must_be("bits", 4, 8)
        config.must_be("checkpoint_format", "gptq", "gptq_v2")
        config.must_be("pack_dtype", "int32")
        dynamic = config.get("dynamic", {})
        if not isinstance(dynamic, Mapping) or not all(isinstance(value, Mapping) for value in dynamic.values()):
            raise CheckpointError(f"{config.file}: dynamic must be an object of objects, got {dynamic!r}")
        return cls(
            config.integer("bits"),
            config.integer("group_size"),
            config.flag("sym", True),
            config.flag("desc_act", False),
            config.text("checkpoint_format", "gptq") == "gptq_v2",
            tuple(dynamic.items()),
        )

    def encode(self, matrix: StoredMatrix) -> Encoded:
        """Raises `CheckpointError`."""
        matrix.take(self.method, (ITEMS, ZEROS, SCALES), (ORDER,))
        items, scales = matrix.tensors[ITEMS], matrix.tensors[SCALES]
        settings = self._settings(items.name.removesuffix(f".{ITEMS}"))
        bits, size = settings["bits"], settings["group_size"]
        if items.dtype != torch.int32:
            raise refuse_dtype(items, self.method)
        columns, rows = items.shape[0] * 32 // bits, items.shape[1]
        group = size if size > 0 else columns
        check_shape(scales, (-(-columns // group), rows), items)
        check_shape(matrix.tensors[ZEROS], (scales.shape[0], rows * bits // 32), items)
        if ORDER in matrix.tensors:
            check_shape(matrix.tensors[ORDER], (columns,), items)
        is_symmetric, is_ordered = settings["sym"], settings["desc_act"]
        held = _held(bits, group if group < columns else 0, scales.dtype, is_symmetric)
        is_held = not is_ordered and columns % group == 0 and not held.refusal((rows,), columns)
        decode = partial(
            _decode,
            bits=bits,
            group=group,
            plus=0 if self.has_whole_zeros else 1,
            is_symmetric=is_symmetric,
            is_held=is_held,
            stored=items,
        )
        whole = {role: TensorRows(stored, 0) for role, stored in matrix.tensors.items()}
        return Encoded(items, (rows, columns), held if is_held else PLAIN, whole, decode, 0)

    def _settings(self, module: str) -> dict[str, Any]:
        """bits, group_size, sym and desc_act of a module: those of the first pattern that names it come before the
        model's own."""
        own = {"bits": self.bits, "group_size": self.group_size, "sym": self.is_symmetric, "desc_act": self.is_ordered}
        for pattern, changes in self.dynamic:
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                return own | {name: value for name, value in changes.items() if name in own}
        return own

    @property
    def declared(self) -> WeightFormat:
        return PLAIN if self.is_ordered else _held(self.bits, max(0, self.group_size), torch.float16, self.is_symmetric)


def _held(bits: int, group: int, scale_dtype: torch.dtype, is_symmetric: bool) -> WeightFormat:
    if bits == 8:
        return WeightFormat("int8", (1, group), scale_dtype) if is_symmetric else PLAIN
    return WeightFormat("int4", (1, group), scale_dtype, not is_symmetric)


def _decode(
    tensors: Tensors, *, bits: int, group: int, plus: int, is_symmetric: bool, is_held: bool, stored: StoredTensor
) -> Weight:
    items = unpack(tensors[ITEMS], bits, 0).t()  # [N, K]
    scale = tensors[SCALES].t()
    zero = unpack(tensors[ZEROS], bits, 1).t().short() + plus - (1 << (bits - 1))
    if is_symmetric and zero.any():
        raise CheckpointError(
            f"{stored.path}: the qzeros of {stored.name} are not those of symmetric groups, which quantization_config "
            "(sym) says"
        )
    order = tensors.get(ORDER)
    columns = torch.arange(items.shape[1], device=items.device)
    if is_held and order is not None and not torch.equal(order.long(), columns // group):
        raise CheckpointError(
            f"{stored.path}: the g_idx of {stored.name} orders its columns, which quantization_config (desc_act) denies"
        )
    if is_held:
        return integers(items, scale, None if is_symmetric else zero, bits)
    by_column = columns // group if order is None else order.long()
    values = items.float() - (1 << (bits - 1)) - zero.float()[:, by_column]
    return Weight(values * scale.float()[:, by_column])
