"""`prefill` in three launches: `convolve`, `prepare`, `walk`."""

from __future__ import annotations

from torch import Tensor

from ..bundles import Rows
from .contract import DeltaInputs, DeltaState, DeltaWeights
from .convolve import convolve
from .prepare import prepare
from .tiles import head_counts
from .walk import walk


def prefill(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    rows: Rows,
    context_lens: Tensor,
    places: Tensor,
    snapshots: DeltaState,
    out: Tensor,
) -> Tensor:
    """Contract: `Delta.prefill`."""
    if out.shape[0] == 0 or rows.slots.shape[0] == 0:
        return out
    dims = head_counts(inputs, pool)
    x = convolve(inputs, weights, pool, rows, context_lens, dims)
    prepared = prepare(x, inputs, weights, rows, context_lens, dims)
    walk(x, prepared, inputs, pool, rows, context_lens, places, snapshots, out, dims)
    return out
