"""A matrix product, the part that most other parts are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from ...kernels.bundles import Weight
from ..loading.target import Target, place
from ..loading.weight_format import WeightFormat
from .build import Build, Matrices


class Projection(Matrices):
    """One matrix [sum of rows, in] for several projections of the same input.

    `pieces`: checkpoint name -> rows, in the order of the output channels. `dtype`: of a matrix that is always plain.
    `format`: by default the one that `Build.format` chooses for these pieces. `split`: "in" where the ranks hold parts
    of the input's channels, so that their products are summed.
    """

    def __init__(
        self,
        in_features: int,
        pieces: dict[str, int],
        build: Build,
        *,
        dtype: torch.dtype | None = None,
        format: WeightFormat | None = None,
        split: Literal["in"] | None = None,
    ) -> None:
        super().__init__()
        self.pieces = pieces
        self.dense = build.kernels.dense
        self.shard = build.shard if split == "in" else None
        self.part = build.part if dtype is None else None
        rows = list(pieces.values())
        if dtype is not None:
            self.matrix = Weight(build.parameter(sum(rows), in_features, dtype=dtype))
        else:
            format = format or build.format(stored_names(pieces), rows, in_features)
            self.matrix = build.matrix(format, sum(rows), in_features)
        self.weights = (self.matrix,)
        self.weight, self.scale, self.zero, _ = self.matrix

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] -> [T, out], in x's dtype or in `dtype`."""
        out = self.dense.linear(x, self.matrix, dtype)
        return out if self.shard is None else self.shard.sum(out)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, in] -> a view [T, rows] of the product for each piece."""
        return self(x).split(list(self.pieces.values()), dim=-1)

    def targets(self, prefix: str) -> Iterator[Target]:
        """`{prefix}{piece}.weight` for each piece."""
        start = 0
        for name, rows in self.pieces.items():
            yield Target(f"{prefix}{name}.weight", place(self.matrix.rows(start, rows)))
            start += rows


def stored_names(pieces: Iterable[str]) -> list[str]:
    """The canonical names of the tensors that fill these pieces."""
    return [f"{name}.weight" for name in pieces]
