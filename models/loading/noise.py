"""Random weights, the same each time, for measurements."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...kernels.bundles import Weight
from ...kernels.quantised import FP8

STD = 0.02
CHUNK_ITEMS = 1 << 24  # of random numbers in float32 at a time


def fill_with_noise(parameters: Iterable[Tensor], std: float = STD) -> None:
    """In place: matrices N(0, std), vectors (norms) 1. Integers and 8-bit floats, which are parts of quantised
    matrices, stay as they are."""
    for seed, parameter in enumerate(parameters):
        if not parameter.is_floating_point() or parameter.itemsize < 2:
            continue
        if parameter.ndim > 1:
            parameter.normal_(0.0, std, generator=_generator(parameter, seed))
        else:
            parameter.fill_(1.0)


def fill_quantised_with_noise(weight: Weight, std: float = STD) -> None:
    """In place: items of mean 0 and standard deviation `std`; a plain matrix stays as it is.

    Integers are uniform over their range, which is symmetric: an int4 matrix without zeros lacks the -8 for that.
    """
    if weight.scale is None:
        return
    data, generator = weight.data.view(-1), _generator(weight.data, 0)
    if data.dtype == FP8:
        for part in data.split(CHUNK_ITEMS):
            part.copy_(torch.randn(part.shape, generator=generator, device=part.device))
        weight.scale.fill_(std)
        return
    if data.dtype == torch.int8:
        data.random_(-127, 128, generator=generator)
        weight.scale.fill_(std / _uniform_std(127))
        return
    bytes_ = data.view(torch.uint8)
    for part in bytes_.split(CHUNK_ITEMS):
        low, high = (torch.randint(1, 16, part.shape, generator=generator, device=part.device) for _ in range(2))
        part.copy_(low | high << 4)
    weight.scale.fill_(std / _uniform_std(7))
    if weight.zero is not None:
        weight.zero.zero_()


def _uniform_std(largest: int) -> float:
    """Of the integers from -largest to largest."""
    return float((largest * (largest + 1) / 3) ** 0.5)


def _generator(tensor: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(tensor.device).manual_seed(seed)
