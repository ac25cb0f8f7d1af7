"""The device, dtype, kernels, shard and weight formats that every part of a model is built with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ...kernels import Kernels
from ...kernels.bundles import KINDS, Weight
from ..loading.formats.choice import Formats
from ..loading.weight_format import PLAIN, Part, WeightFormat
from .shard import Shard

DATA_DTYPES = {kind: dtype for dtype, kind in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Build:
    """Where a model lives, which kernels compute it, and how its matrices are stored. On the device `meta` a model
    takes no memory.

    `name` is the beginning of the canonical names of the tensors that fill the part that is being built. `part` is the
    part of the model to which its matrices belong, None where they are always plain.
    """

    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    shard: Shard = field(default_factory=Shard)
    formats: Formats = field(default_factory=Formats)
    name: str = ""
    part: Part | None = None

    def within(self, name: str, part: Part | None = None) -> Build:
        """For a part of this part, whose tensors' names go on with `name`."""
        return replace(self, name=self.name + name, part=part or self.part)

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """An uninitialised parameter without gradient; `dtype` defaults to the model's. `loading.weights` fills it or
        fails."""
        data = torch.empty(*shape, device=self.device, dtype=dtype or self.dtype)
        return nn.Parameter(data, requires_grad=False)

    def format(self, names: Iterable[str], pieces: Sequence[int], columns: int) -> WeightFormat:
        """The format of a matrix, by `Formats.choose`; `names` without the part's own name in front."""
        if self.part is None:
            return PLAIN
        return self.formats.choose(self.part, [self.name + name for name in names], pieces, columns)

    def matrix(self, format: WeightFormat, *shape: int) -> Weight:
        """An uninitialised matrix [.., N, K] whose tensors are parameters."""
        *leading, rows, columns = shape
        if format.kind == "plain":
            return Weight(self.parameter(*shape))
        block = format.block_of(columns)
        scales = (*leading, -(-rows // block[0]), -(-columns // block[1]))
        width = columns // 8 if format.kind == "int4" else columns
        return Weight(
            self.parameter(*leading, rows, width, dtype=DATA_DTYPES[format.kind]),
            self.parameter(*scales, dtype=format.scale_dtype),
            self.parameter(*scales, dtype=torch.int8) if format.has_zero else None,
            block,
        )


class Matrices(nn.Module):
    """A module with matrices that may be quantised."""

    part: Part | None  # of the model; None where they are always plain
    weights: tuple[Weight, ...]


def matrices_of(model: nn.Module) -> Iterator[tuple[Part, Weight]]:
    """The matrices of a model that may be quantised, each with its part."""
    for module in model.modules():
        if isinstance(module, Matrices) and module.part is not None:
            for weight in module.weights:
                yield module.part, weight
