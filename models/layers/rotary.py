"""Cosines and sines by position, for the layers that rotate their queries and keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..specs import RopeSpec

PIECE = 1 << 16  # positions whose float64 angles exist at once


class RotaryTable:
    """Cosines and sines for every position, [max_positions, R] float32; grown once the context length is known.

    Angles are in float64, so that far positions stay exact.
    """

    def __init__(self, spec: RopeSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.cos_sin = torch.empty(0, spec.dim, device=device)

    def reserve(self, max_positions: int) -> None:
        """Hold positions 0 to `max_positions` - 1 at least."""
        if max_positions <= self.cos_sin.shape[0]:
            return
        inv_freq, factor = frequencies(self.spec), 1.0 if self.spec.yarn is None else self.spec.yarn.attention_factor
        self.cos_sin = torch.empty(max_positions, self.spec.dim, device=self.device)
        for start in range(0, max_positions, PIECE):
            end = min(start + PIECE, max_positions)
            angles = torch.arange(start, end, dtype=torch.float64)[:, None] * inv_freq
            self.cos_sin[start:end] = torch.cat([angles.cos(), angles.sin()], dim=-1) * factor

    def nbytes(self, max_positions: int) -> int:
        """Bytes of a table for so many positions."""
        return max_positions * self.spec.dim * self.cos_sin.element_size()


def frequencies(spec: RopeSpec) -> Tensor:
    """Radians per position of each pair, [R/2] float64: theta^{-2j/R} (Su et al. 2021), which yarn lowers."""
    plain = spec.theta ** (-torch.arange(0, spec.dim, 2, dtype=torch.float64) / spec.dim)
    if spec.yarn is None:
        return plain
    yarn, pairs = spec.yarn, torch.arange(spec.dim // 2, dtype=torch.float64)

    def pair_of(turns: float) -> float:
        """The pair that turns so many times within the original context."""
        return spec.dim * math.log(yarn.original_len / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    first, last = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.is_rounded:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, spec.dim - 1)
    lowered = ((pairs - first) / ((last - first) or 1e-3)).clamp(0.0, 1.0)
    return plain * (1.0 - lowered) + plain / yarn.factor * lowered


class RotaryTables:
    """A model's tables, one for each `RopeSpec`: layers that rotate alike share one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[RopeSpec, RotaryTable] = {}

    def table(self, spec: RopeSpec) -> RotaryTable:
        """The table of this rotation, empty until `reserve`."""
        if spec not in self._tables:
            self._tables[spec] = RotaryTable(spec, self._device)
        return self._tables[spec]

    def __iter__(self) -> Iterator[RotaryTable]:
        return iter(self._tables.values())

    def reserve(self, max_positions: int) -> None:
        """Hold positions 0 to `max_positions` - 1 at least, in every table."""
        for table in self:
            table.reserve(max_positions)

    def nbytes(self, max_positions: int) -> int:
        """Bytes on the device that all tables take for so many positions."""
        return sum(table.nbytes(max_positions) for table in self)
