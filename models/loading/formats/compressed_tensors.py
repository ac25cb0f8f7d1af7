"""compressed-tensors (LLM Compressor): one format for each group of a model's linear layers.

| format | tensors beside `x.` |
|---|---|
| pack-quantized | `weight_packed` int32 [N, K b/32], value + 2^(b - 1), lowest bits first; `weight_scale` [N, K / g] |
| int-quantized, float-quantized, naive-quantized, mxfp8-quantized | `weight` int8 or float8_e4m3fn; `weight_scale` |
| nvfp4-pack-quantized | `weight_packed` uint8 [N, K / 2]; `weight_scale` [N, K / 16], over `weight_global_scale` |
| mxfp4-pack-quantized | `weight_packed` uint8 [N, K / 2]; `weight_scale` [N, K / 32], exponents of 2 |

Packed matrices may have a `weight_zero_point`, packed along N, a `weight_g_idx` [K], which gives each column's group,
and a `weight_shape`, which follows from the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

from ....kernels.bundles import Weight, WeightKind
from ...errors import CheckpointError
from ..weight_format import PLAIN, WeightFormat
from .config import QuantizationConfig
from .eight_bits import FP8, encode_eight_bits
from .encoded import WEIGHT, Encoded, StoredMatrix, TensorRows, Tensors, check_shape, refuse_dtype
from .four_bits import encode_fp4, integers, unpack

PACKED, SCALE, ZERO, ORDER, SHAPE = (f"weight_{name}" for name in ("packed", "scale", "zero_point", "g_idx", "shape"))


class Group(NamedTuple):
    """The weights of one of `config_groups`."""

    targets: tuple[str, ...]
    bits: int
    is_float: bool
    strategy: str
    group_size: int | None
    is_symmetric: bool

    def is_for(self, module: str) -> bool:
        """Whether the group's targets name this module, or the class of all linear layers."""
        return any(
            re.match(target[3:], module) is not None if target.startswith("re:") else target in ("Linear", module)
            for target in self.targets
        )


@dataclass(frozen=True)
class CompressedTensors:
    method: ClassVar[str] = "compressed-tensors"

    groups: tuple[Group, ...]

    @classmethod
    def read(cls, config: QuantizationConfig) -> CompressedTensors:
        """Raises `CheckpointError`."""
        groups = config.get("config_groups", {})
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError(f"{config.file}: config_groups must be an object of groups, got {groups!r}")
        config.must_be("quantization_status", "compressed", "frozen")
        if config.get("sparsity_config"):
            QuantizationConfig(config.file, config.get("sparsity_config")).must_be("format", "dense")
        return cls(tuple(_read_group(f"config_groups.{name}", group, config) for name, group in groups.items()))

    def encode(self, matrix: StoredMatrix) -> Encoded:
        """Raises `CheckpointError`."""
        if PACKED not in matrix.tensors:
            matrix.take(self.method, (WEIGHT, SCALE), (ZERO,))
            weight = matrix.tensors[WEIGHT]
            if weight.dtype not in (FP8, torch.int8):
                raise refuse_dtype(weight, self.method)
            return encode_eight_bits(matrix, SCALE)
        packed = matrix.tensors[PACKED]
        if packed.dtype == torch.uint8 and "weight_global_scale" in matrix.tensors:
            matrix.take(self.method, (PACKED, SCALE, "weight_global_scale"))
            return encode_fp4(matrix, packed, SCALE, "weight_global_scale", divides=True)
        if packed.dtype == torch.uint8:
            matrix.take(self.method, (PACKED, SCALE))
            return encode_fp4(matrix, packed, SCALE)
        return self._encode_integers(matrix)

    def _encode_integers(self, matrix: StoredMatrix) -> Encoded:
        matrix.take(self.method, (PACKED, SCALE), (ZERO, ORDER, SHAPE))
        packed, scale = matrix.tensors[PACKED], matrix.tensors[SCALE]
        if packed.dtype != torch.int32:
            raise refuse_dtype(packed, self.method)
        bits = self._bits(matrix)
        *leading, rows, words = packed.shape
        columns = words * 32 // bits
        has_zero, has_order = ZERO in matrix.tensors, ORDER in matrix.tensors
        tensors = {PACKED: TensorRows(packed), SCALE: TensorRows(scale)}
        step = 1
        if has_zero:
            check_shape(matrix.tensors[ZERO], (*leading, -(-rows * bits // 32), scale.shape[-1]), packed)
            tensors[ZERO] = TensorRows(matrix.tensors[ZERO], step := 32 // bits)
        if has_order:
            check_shape(matrix.tensors[ORDER], (*leading, columns), packed)
            tensors[ORDER] = TensorRows(matrix.tensors[ORDER], 0)
        decode = partial(_decode, bits=bits)
        block = (1, 0) if scale.shape[-1] == 1 else (1, columns // scale.shape[-1])
        held = WeightFormat("int4" if bits == 4 else "int8", block, scale.dtype, has_zero)
        format = PLAIN if has_order or (bits == 8 and has_zero) or held.refusal((rows,), columns) else held
        return Encoded(packed, (*leading, rows, columns), format, tensors, decode, step)

    def _bits(self, matrix: StoredMatrix) -> int:
        """4 or 8, of the group for this module whose groups of columns fit the shapes."""
        packed, scale = matrix.tensors[PACKED], matrix.tensors[SCALE]
        module = packed.name.removesuffix(f".{PACKED}")
        groups = [group for group in self.groups if not group.is_float and group.is_for(module)]
        for group in groups or [group for group in self.groups if not group.is_float]:
            columns = packed.shape[-1] * 32 // group.bits
            if scale.shape == (*packed.shape[:-1], columns // (group.group_size or columns)):
                return group.bits
        told = ", ".join(f"{group.bits} bits in groups of {group.group_size or 'a row'}" for group in self.groups)
        raise CheckpointError(
            f"{scale.path}: tensor {scale.name} has shape {list(scale.shape)}, beside {packed.name} of shape "
            f"{list(packed.shape)}; quantization_config describes {told}"
        )

    @property
    def declared(self) -> WeightFormat:
        """Of the first group."""
        group = self.groups[0]
        block = (1, group.group_size or 0)
        if group.is_float and group.bits == 8:
            return WeightFormat("fp8", (128, 128) if group.strategy == "block" else (1, 0))
        if group.is_float or (group.bits == 8 and not group.is_symmetric):
            return PLAIN
        kind: WeightKind = "int8" if group.bits == 8 else "int4"
        return WeightFormat(kind, block, torch.bfloat16, not group.is_symmetric)


def _read_group(name: str, group: Any, config: QuantizationConfig) -> Group:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{config.file}: {name}.weights must be an object, got {weights!r}")
    fields = QuantizationConfig(f"{config.file}: {name}", weights)
    fields.must_be("num_bits", 4, 8)
    fields.must_be("type", "int", "float")
    fields.must_be("strategy", "tensor", "channel", "group", "block", "tensor_group")
    size = fields.get("group_size")
    return Group(
        QuantizationConfig(f"{config.file}: {name}", group).texts("targets"),
        fields.integer("num_bits"),
        fields.text("type", "int") == "float",
        fields.text("strategy", "tensor"),
        size if isinstance(size, int) and size > 0 else None,
        fields.flag("symmetric", True),
    )


def _decode(tensors: Tensors, *, bits: int) -> Weight:
    items, scale = unpack(tensors[PACKED], bits, -1), tensors[SCALE]
    zero = None
    if ZERO in tensors:
        zero = unpack(tensors[ZERO], bits, -2)[: items.shape[0]].short() - (1 << (bits - 1))
    if ORDER in tensors:
        group = tensors[ORDER].long()
        values = items.float() - (1 << (bits - 1))
        if zero is not None:
            values -= zero.float()[:, group]
        return Weight(values * scale.float()[:, group])
    return integers(items, scale, zero, bits)
