"""Matrices of 8-bit items beside a scale: the parts that several published formats share."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ....kernels.bundles import Weight
from ...errors import CheckpointError
from ..header import StoredTensor
from ..weight_format import PLAIN, WeightFormat
from .encoded import WEIGHT, Encoded, StoredMatrix, TensorRows, Tensors

FP8 = torch.float8_e4m3fn
POWERS = (torch.uint8, torch.float8_e8m0fnu)  # scales that are the exponent of 2, plus 127
BLOCK = 128


def powers_of_two(scale: Tensor) -> Tensor:
    """The values, in float32, of scales stored as exponents."""
    return scale.view(torch.float8_e8m0fnu).float()


def encode_eight_bits(matrix: StoredMatrix, scale_role: str, block: tuple[int, int] | None = None) -> Encoded:
    """A matrix of float8_e4m3fn or int8 items. `block`: rows and columns that share a scale; None = as the scale's
    shape tells: one of all items, of a row, of a group of a row's columns, or of a block of 128 x 128.

    Raises `CheckpointError` for a scale of any other shape.
    """
    weight, scale = matrix.tensors[WEIGHT], matrix.tensors[scale_role]
    zero = matrix.tensors.get("weight_zero_point")
    scale = _without_ones(weight, scale)
    block = _block(weight, scale, block)
    by_matrix = block == (0, 0)
    columns = weight.shape[-1]
    scale_rows = 0 if by_matrix else block[0]
    tensors = {WEIGHT: TensorRows(weight), scale_role: TensorRows(scale, scale_rows)}
    if zero is not None:
        tensors["weight_zero_point"] = TensorRows(_without_ones(weight, zero), scale_rows)
    decode = partial(_decode, scale_role=scale_role, block=(1, columns) if by_matrix else block)
    format = PLAIN if zero is not None else _format(weight.dtype, scale.dtype, block, columns)
    return Encoded(weight, weight.shape, format, tensors, decode, max(1, block[0]))


def _without_ones(weight: StoredTensor, scale: StoredTensor) -> StoredTensor:
    """A scale of blocks [N / 128, 1, K / 128, 1] as [N / 128, K / 128]; one of rows [N] as [N, 1]."""
    if len(scale.shape) == 4 and len(weight.shape) == 2 and scale.shape[1] == scale.shape[3] == 1:
        return scale.reshaped(scale.shape[0], scale.shape[2])
    if scale.shape == weight.shape[:-1]:
        return scale.reshaped(*scale.shape, 1)
    return scale


def _block(weight: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share a scale; (0, 0) = all."""
    *leading, rows, columns = weight.shape
    by_matrix = {(*leading, *ones) for ones in ((), (1,), (1, 1))} if block is None and rows > 1 else set()
    if scale.shape in by_matrix:
        return 0, 0
    if block is not None:
        allowed = [block]
    else:
        groups = scale.shape[-1] if scale.shape else 0
        by_group = [(1, columns // groups)] if groups and columns % groups == 0 else []
        allowed = [(1, columns), *by_group, (BLOCK, BLOCK)]
    shapes = [(*leading, -(-rows // each[0]), -(-columns // each[1])) for each in allowed]
    for each, shape in zip(allowed, shapes, strict=True):
        if scale.shape == shape:
            return each
    listed = " or ".join(str(list(shape)) for shape in dict.fromkeys((shapes[0], shapes[-1])))
    raise CheckpointError(
        f"{scale.path}: tensor {scale.name} has shape {list(scale.shape)}, but {weight.name} of shape "
        f"{list(weight.shape)} asks for {listed}"
    )


def _format(items: torch.dtype, scale: torch.dtype, block: tuple[int, int], columns: int) -> WeightFormat:
    """The format that holds such a matrix, or PLAIN."""
    if block[0] > 1:
        return WeightFormat("fp8", block) if items == FP8 and block == (BLOCK, BLOCK) else PLAIN
    by_row = block[1] in (0, columns)
    if items == FP8:
        return WeightFormat("fp8", (1, 0)) if by_row else PLAIN
    return WeightFormat("int8", (1, 0) if by_row else block, torch.float32 if scale in POWERS else scale)


def _decode(tensors: Tensors, *, scale_role: str, block: tuple[int, int]) -> Weight:
    data, scale = tensors[WEIGHT], tensors[scale_role]
    if scale.dtype in POWERS:
        scale = powers_of_two(scale)
    elif data.dtype == FP8:
        scale = scale.float()
    if scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(data.shape[0], 1)
    weight = Weight(data, scale, None, block)
    if "weight_zero_point" not in tensors:
        return weight
    zero = tensors["weight_zero_point"].float()
    if zero.numel() == 1:
        zero = zero.reshape(1, 1).expand(data.shape[0], 1)
    values = data.float() - zero.repeat_interleave(block[1], dim=-1)
    return Weight(values * scale.float().repeat_interleave(block[1], dim=-1))
