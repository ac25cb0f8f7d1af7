"""The inputs of a CUDA graph on the host: a step's arrays at their places in the graph's shape, padding elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...models.forward_batch import Each, layout_of
from ..memory.operations import StepSave
from .arrays import Arrays, packed
from .block_tables import CELLS
from .counts import Counts
from .graph_shapes import SNAPSHOTS, VERIFY_TOKENS, GraphShape
from .sampler import SamplingInputs
from .step_input import BATCH

SAMPLING = layout_of(SamplingInputs)
# The fields with one entry per decode row, without `logits_indices`: row i's is i in every step.
DECODE_FIELDS = {name: each for name, each in (BATCH | SAMPLING).items() if each.axis in ("token", "row", "draw")}
DECODE_FIELDS.pop("logits_indices")


class Padding(NamedTuple):
    """The inputs of a step without rows."""

    arrays: Arrays
    packed: np.ndarray  # uint8


class GraphInputs:
    """The shapes that have graphs, increasing, and the padding of each."""

    def __init__(self, shapes: Sequence[GraphShape]) -> None:
        self.shapes = shapes
        self._padding: dict[GraphShape, Padding] = {}

    def shape_for(self, counts: Counts) -> GraphShape | None:
        """The smallest shape that holds a step of these counts, or None."""
        return next((shape for shape in self.shapes if shape.holds(counts)), None)

    def shape_of_decodes(self, num_rows: int) -> GraphShape | None:
        """The smallest shape for `num_rows` decode rows alone, or None."""
        return self.shape_for(Counts(0, 0, num_rows, max_query_len=1))

    def padding(self, shape: GraphShape) -> Padding:
        """The arrays of `pad` for a step without rows. Shared: the caller must not change them."""
        if shape not in self._padding:
            nothing: Arrays = {name: np.empty(0, dtype=each.dtype) for name, each in (BATCH | SAMPLING).items()}
            nothing["query_start_loc"] = np.zeros(1, dtype=np.int32)
            nothing["snapshots"] = np.empty((0, len(StepSave._fields)), dtype=np.int32)
            arrays = pad(nothing, Counts(0, 0, 0, max_query_len=1), shape, np.empty(0, dtype=np.int64))
            self._padding[shape] = Padding(arrays, packed(arrays))
        return self._padding[shape]


def pad(arrays: Arrays, counts: Counts, shape: GraphShape, places: np.ndarray) -> Arrays:
    """The arrays of a step at their places in the shape. places: [N] int64, the place of each draw (`places_of_draws`).

    A shape without prompts has places for new cells of the block tables instead of `query_start_loc`,
    `logits_indices` and `snapshots`.
    """
    rows, tokens = (counts.num_prefills, shape.num_prefills), (counts.num_prefill_tokens, shape.num_prefill_tokens)
    sizes = {"token": (shape.num_tokens, *tokens), "row": (shape.num_rows, *rows)}
    padded: Arrays = {}
    for name, each in BATCH.items():
        if each.axis in sizes:
            size, own, first = sizes[each.axis]
            padded[name] = _filled(each, size)
            padded[name][:own] = arrays[name][:own]
            padded[name][first : first + counts.num_decodes] = arrays[name][own:]
    for name, each in SAMPLING.items():
        padded[name] = _filled(each, shape.num_draws)
        padded[name][places] = arrays[name]
    if not shape.num_prefills:
        return padded | {name: np.zeros(shape.num_rows, dtype=dtype) for name, dtype in CELLS.items()}
    starts = row_starts(arrays["query_start_loc"][: counts.num_prefills + 1], shape)
    if shape.num_verifies:
        return padded | {"query_start_loc": starts, "logits_indices": np.arange(shape.num_tokens)}
    snapshots = _filled(BATCH["snapshots"], SNAPSHOTS, arrays["snapshots"].shape[1])
    snapshots[: len(arrays["snapshots"])] = arrays["snapshots"]
    last = np.maximum(starts[1:] - 1, 0).astype(np.int64)
    return padded | {"query_start_loc": starts, "logits_indices": last, "snapshots": snapshots}


def _filled(each: Each, *size: int) -> np.ndarray:
    return np.full(size, each.padding, dtype=each.dtype)


def row_starts(own: np.ndarray, shape: GraphShape) -> np.ndarray:
    """`query_start_loc` of a shape. own: the starts of a step's prompts or verify rows, and the end of the last.

    The other tokens are padding. After prompts the shape's last prefill row takes all of them, after verify rows the
    padding rows share them.
    """
    starts = np.full(shape.num_rows + 1, own[-1], dtype=np.int32)
    starts[: len(own)] = own
    if shape.num_verifies:  # no row may be longer than a ring
        padding = own[-1] + VERIFY_TOKENS * np.arange(1, len(starts) - len(own) + 1)
        starts[len(own) :] = np.minimum(padding, shape.num_tokens)
        return starts
    starts[shape.num_prefills :] = np.arange(shape.num_prefill_tokens, shape.num_tokens + 1)
    return starts


def places_of_draws(completing_rows: list[int], counts: Counts, shape: GraphShape) -> np.ndarray:
    """The index [N] int64 of each of the step's draws among the draws of the shape."""
    if counts.num_drafted:
        return np.arange(counts.num_drafted_tokens)
    rows = np.array(completing_rows, dtype=np.int64)
    rows[rows >= counts.num_prefills] += shape.num_prefills - counts.num_prefills
    return rows
