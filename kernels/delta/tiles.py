"""Tiles of one token's step, and the counts of heads that follow from the shapes."""

from __future__ import annotations

from typing import NamedTuple

import triton

from ..lightning.tile import num_processors, padded
from .contract import DeltaInputs, DeltaState


class StepTiles(NamedTuple):
    """A state tile [BV, BK] of a single token's step, and warps per program."""

    BK: int
    BV: int
    num_warps: int


def step_tiles(pool: DeltaState, num_rows: int) -> StepTiles:
    """Tiles for one token per row. Each convolves and norms its head's query and key again, so they are wide; narrower
    where few rows leave processors idle."""
    num_heads, V, K = pool.state.shape[1:]
    BV = min(padded(V), 64)
    while BV > 8 and num_rows * num_heads * triton.cdiv(V, BV) < 2 * num_processors(pool.state.device):
        BV //= 2
    return StepTiles(padded(K), BV, 2 if BV == 64 else 1)


def head_counts(inputs: DeltaInputs, pool: DeltaState) -> tuple[int, int, int, int]:
    """Hk, Hv, K, V."""
    num_heads, V, K = pool.state.shape[1:]
    return (inputs.raw.shape[1] - num_heads * V) // (2 * K), num_heads, K, V
