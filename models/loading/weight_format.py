"""The format in which a model holds a matrix, as `kernels.bundles.Weight` describes it, before the matrix exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from ...kernels.bundles import WeightKind

Part = Literal["experts", "mixers", "mlp"]  # of a model: the matrices that a setting quantises together
GROUPS = (128, 64, 32)  # columns that may share a scale, beside all of a row
UNIT = 64  # columns of int4 that are packed together


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The fields of a `Weight`. Of plain matrices the others have no meaning."""

    kind: WeightKind = "plain"
    block: tuple[int, int] = (1, 0)  # rows and columns that share a scale; 0 columns = all of a row
    scale_dtype: torch.dtype = torch.float32
    has_zero: bool = False

    def block_of(self, columns: int) -> tuple[int, int]:
        """`Weight.block` of a matrix with so many columns."""
        return self.block[0], self.block[1] or columns

    def refusal(self, pieces: Sequence[int], columns: int) -> str | None:
        """The reason why a matrix cannot be held so, or None. `pieces`: the rows of its pieces, one below the other."""
        block_rows, group = self.block_of(columns)
        if self.kind == "plain":
            return None
        if any(start % block_rows for start in list(accumulate(pieces))[:-1]):
            return f"its pieces of {_listed(pieces)} rows do not begin at multiples of {block_rows}"
        if self.kind == "fp8":
            return None
        if self.kind == "int4" and columns % UNIT:
            return f"its {columns} columns are no multiple of {UNIT}"
        if columns % group or group not in (*GROUPS, columns):
            return f"its {columns} columns do not divide into groups of {group}"
        return None

    def remedy(self, pieces: Sequence[int], columns: int) -> str:
        """What would work for a matrix that this format refuses."""
        fitting = [str(g) for g in GROUPS if columns % g == 0 and (self.kind != "int4" or columns % UNIT == 0)]
        if self.kind != "fp8" and fitting:
            return f"set quantization_group to {' or '.join(fitting)}"
        others = [WeightFormat("fp8", (128, 128)), WeightFormat("int8", (1, 128)), WeightFormat("int8", (1, 32))]
        kinds = dict.fromkeys(
            other.kind for other in others if other.kind != self.kind and not other.refusal(pieces, columns)
        )
        return f"take {' or '.join((*kinds, 'none'))} for this part"


PLAIN = WeightFormat()


def _listed(pieces: Sequence[int]) -> str:
    shown = ", ".join(map(str, pieces[:4]))
    return f"{shown}, ..." if len(pieces) > 4 else shown
