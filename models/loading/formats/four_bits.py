"""Matrices of 4-bit items: floats in pairs (nvfp4, mxfp4), and integers in words (int4)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ....kernels.bundles import Weight
from ....kernels.quantised import pack_int4
from ..header import StoredTensor
from ..weight_format import PLAIN
from .eight_bits import FP8, POWERS, powers_of_two
from .encoded import Encoded, StoredMatrix, TensorRows, Tensors, check_shape, refuse_dtype

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign
ITEMS, SCALES, GLOBAL = "items", "scales", "global"
NVFP4_GROUP, MXFP4_GROUP = 16, 32


def encode_fp4(
    matrix: StoredMatrix,
    packed: StoredTensor,
    scale_role: str,
    global_role: str | None = None,
    *,
    divides: bool = False,
) -> Encoded:
    """Items of E2M1 in pairs, the even column in the low nibble: [N, K / 2] uint8.

    With `global_role` nvfp4: scales [N, K / 16] in float8_e4m3fn, times a scalar in float32, or divided by it where
    `divides`. Without, mxfp4: scales [N, K / 32], exponents of 2. Raises `CheckpointError`.
    """
    scale, is_nv = matrix.tensors[scale_role], global_role is not None
    group = NVFP4_GROUP if is_nv else MXFP4_GROUP
    *leading, half = packed.shape
    columns = 2 * half
    check_shape(scale, (*leading, columns // group), packed)
    if packed.dtype != torch.uint8:
        raise refuse_dtype(packed, "nvfp4" if is_nv else "mxfp4")
    if not (scale.dtype == FP8 if is_nv else scale.dtype in POWERS):
        raise refuse_dtype(scale, "nvfp4" if is_nv else "mxfp4")
    tensors = {ITEMS: TensorRows(packed), SCALES: TensorRows(scale)}
    if global_role is not None:
        tensors[GLOBAL] = TensorRows(matrix.tensors[global_role], 0)
    return Encoded(packed, (*leading, columns), PLAIN, tensors, partial(_decode_fp4, group=group, divides=divides))


def _decode_fp4(tensors: Tensors, *, group: int, divides: bool) -> Weight:
    pairs = tensors[ITEMS]
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), device=pairs.device)
    values = table[codes.int()]
    if GLOBAL in tensors:
        total = tensors[GLOBAL].float().reshape(())
        scale = tensors[SCALES].float() / total if divides else tensors[SCALES].float() * total
    else:
        scale = powers_of_two(tensors[SCALES])
    return Weight(values * scale.repeat_interleave(group, dim=-1))


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned items of `bits` bits, 4 or 8, of which an int32 word holds the first in its lowest bits. The words lie
    along `dim`; items take their place there. uint8."""
    words = words.movedim(dim, -1).clone(memory_format=torch.contiguous_format)
    items = words.view(torch.uint8)  # byte b of a word has its items of the bits from 8 b on
    if bits == 4:
        items = torch.stack((items & 15, items >> 4), dim=-1).flatten(-2)
    return items.movedim(-1, dim)


def integers(items: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Weight:
    """items [N, K] uint8 of `bits` bits, worth (item - 2^(bits - 1) - zero) * scale; scale and zero: [N, K / g]. As
    the format that holds them, or in float32 where none does."""
    group = items.shape[-1] // scale.shape[-1]
    if bits == 4 and items.shape[-1] % 64 == 0:
        return Weight(pack_int4(items), scale, None if zero is None else zero.to(torch.int8), (1, group))
    values = items.short() - (1 << (bits - 1))
    if zero is None and bits == 8:
        return Weight(values.to(torch.int8), scale, None, (1, group))
    wide = values.float()
    if zero is not None:
        wide -= zero.float().repeat_interleave(group, dim=-1)
    return Weight(wide * scale.float().repeat_interleave(group, dim=-1))
