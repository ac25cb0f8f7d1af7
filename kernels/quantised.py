"""Matrices in 8 and 4 bits: how their items are packed, and how a matrix is rounded to them.

`bundles.Weight` names the formats. Functions take matrices [..., N, K] on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_BLOCK = 128  # rows and columns that share a scale
UNIT = 64  # columns whose nibbles share 8 words
# Fractions of the largest item of a group that its scale may map to the end of the range.
FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


def pack_int4(values: Tensor) -> Tensor:
    """values [..., K] uint8, 0 .. 15, K a multiple of 64 -> words [..., K / 8] int32.

    In each unit of 64 columns, which has 8 words, nibble i of word j is column 8 i + j.
    """
    pairs = values.unflatten(-1, (-1, 4, 2, 8))  # column 8 (2 b + half) + j at [b, half, j]
    low, high = pairs.unbind(-2)
    by_word = (low | high << 4).transpose(-1, -2).contiguous()  # [..., units, 8 words, 4 bytes]
    return by_word.view(torch.int32).flatten(-3)


def unpack_int4(words: Tensor) -> Tensor:
    """words [..., K / 8] int32 -> values [..., K] uint8, 0 .. 15."""
    by_word = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 8, 4))
    by_byte = by_word.transpose(-1, -2)  # [..., units, 4 bytes, 8 words]
    return torch.stack((by_byte & 15, by_byte >> 4), dim=-2).flatten(-4)


def spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each item: scale [..., ceil(N / block[0]), ceil(K / block[1])] -> [..., N, K]."""
    rows, columns = shape[-2:]
    if block[0] > 1:
        scale = scale.repeat_interleave(block[0], dim=-2)[..., :rows, :]
    if block[1] > 1:
        scale = scale.repeat_interleave(block[1], dim=-1)[..., :columns]
    return scale


def quantise_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """data [..., N, K] float8_e4m3fn and scale [..., ceil(N / 128), ceil(K / 128)] float32, the largest item of each
    block / 448."""
    matrix = matrix.float()
    rows, columns = matrix.shape[-2:]
    padding = (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK)
    blocks = torch.nn.functional.pad(matrix, padding).unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scale = _not_zero(blocks.abs().amax(dim=(-3, -1)) / FP8_MAX)
    by_item = spread(scale, (FP8_BLOCK, FP8_BLOCK), matrix.shape)
    return (matrix / by_item).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


def quantise_int8(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """data [..., N, K] int8 and scale [..., N, K / group] bfloat16, the largest item of each group / 127."""
    groups = matrix.float().unflatten(-1, (-1, group))
    scale = _not_zero((groups.abs().amax(dim=-1) / 127).bfloat16())
    data = (groups / scale.float()[..., None]).round_().clamp_(-127, 127)
    return data.to(torch.int8).flatten(-2), scale


def quantise_int4(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """data [..., N, K / 8] int32 and scale [..., N, K / group] bfloat16.

    Of several scales a group has the one with the least squared error. Half of them are negative or positive so that
    the group's largest item becomes -8, which uses all 16 values.
    """
    groups = matrix.float().unflatten(-1, (-1, group))
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    best = best_scale = best_error = None
    for end in (largest.abs() / 7, largest / -8):
        for fraction in FRACTIONS:
            scale = _not_zero((end * fraction).bfloat16())
            wide = scale.float()
            values = (groups / wide).round_().clamp_(-8, 7)
            error = (values * wide).sub_(groups).square_().sum(dim=-1, keepdim=True)
            if best is None or best_scale is None or best_error is None:
                best, best_scale, best_error = values, scale, error
                continue
            is_better = error < best_error
            best = torch.where(is_better, values, best)
            best_scale = torch.where(is_better, scale, best_scale)
            best_error = torch.where(is_better, error, best_error)
    assert best is not None and best_scale is not None
    return pack_int4(best.add_(8).to(torch.uint8).flatten(-2)), best_scale[..., 0]


def _not_zero(scale: Tensor) -> Tensor:
    """1 in place of 0: any scale is right for a group of zeros."""
    return scale.masked_fill_(scale == 0, 1)
