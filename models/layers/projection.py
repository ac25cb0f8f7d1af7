"""A matrix product, the part that most other parts are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels.bundles import Weight
from ..loading.target import Target
from .build import Build


class Projection(nn.Module):
    """One matrix [sum of rows, in] for several projections of the same input.

    `pieces`: checkpoint name -> rows, in the order of the output channels. `split`: "in" where the ranks hold parts of
    the input's channels, so that their products are summed.
    """

    def __init__(
        self,
        in_features: int,
        pieces: dict[str, int],
        build: Build,
        *,
        dtype: torch.dtype | None = None,
        split: Literal["in"] | None = None,
    ) -> None:
        super().__init__()
        self.pieces = pieces
        self.dense = build.kernels.dense
        self.shard = build.shard if split == "in" else None
        self.weight = build.parameter(sum(pieces.values()), in_features, dtype=dtype)
        self.matrix = Weight(self.weight)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] -> [T, out], in x's dtype or in `dtype`."""
        out = self.dense.linear(x, self.matrix, dtype)
        return out if self.shard is None else self.shard.sum(out)

    def targets(self, prefix: str) -> Iterator[Target]:
        """`{prefix}{piece}.weight` for each piece."""
        start = 0
        for name, rows in self.pieces.items():
            yield Target(f"{prefix}{name}.weight", self.weight[start : start + rows])
            start += rows
