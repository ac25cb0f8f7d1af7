"""CUDA graphs of whole steps: one launch instead of hundreds.

A graph is bound to shapes and addresses, so there is one for each of a few shapes, over static inputs; a step takes the
smallest that holds it. The rows that a step does not use are padding with slot -1, for which the kernels write zeros,
and nothing into the pools. Steps of decoding rows alone have graphs of many sizes. Those with prompts have fewer, up to
as many tokens as take the device no longer than the host takes to launch kernel by kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...models.forward_batch import ForwardBatch
from ..memory.operations import StepSave
from .block_tables import BlockTables
from .graph_shapes import SNAPSHOTS, VERIFY_TOKENS, GraphShape
from .sampler import Draw
from .staging import StagingPool
from .step_input import Arrays, Counts, Upload, make_batch, pack, packed_size


class Computed(NamedTuple):
    """What a step computes for each of its draws, those of padding included."""

    logits: Tensor  # [N, V], after a row's last token, of rows with drafts after each token
    tokens: Tensor  # [N] int32, drawn as rows want that look at nothing but their logits


class Padding(NamedTuple):
    """The inputs of a step without rows, on the host."""

    arrays: Arrays
    packed: np.ndarray  # bytes


Step = Callable[[ForwardBatch, Draw], Computed]

TOKEN_DTYPES = {"input_ids": np.int64, "positions": np.int64, "slot_mapping": np.int64}
ROW_DTYPES = {
    "context_lens": np.int32,
    "state_indices": np.int32,
    "num_pending": np.int32,
    "has_initial_state": np.bool_,
}
DRAW_DTYPES = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "uniform": np.float32,
}
# Of shapes without prompts: cells of the block tables that are new in this step, at most one per row, and their blocks.
CELL_DTYPES = {"cells": np.int64, "blocks": np.int32}
# What a padding row or token holds. Its token must exist, its position too; it is drawn greedily.
PADDING = {"context_lens": -1, "state_indices": -1, "slot_mapping": -1}


def pad(arrays: Arrays, counts: Counts, shape: GraphShape, graph_rows: np.ndarray) -> Arrays:
    """The arrays of a step at their places in the shape. `graph_rows`: places of the rows to draw, in their order."""
    rows, tokens = (counts.num_prefills, shape.num_prefills), (counts.num_prefill_tokens, shape.num_prefill_tokens)
    padded: Arrays = {}
    for dtypes, size, (own, first) in ((TOKEN_DTYPES, shape.num_tokens, tokens), (ROW_DTYPES, shape.num_rows, rows)):
        for name, dtype in dtypes.items():
            padded[name] = np.full(size, PADDING.get(name, 0), dtype=dtype)
            padded[name][:own] = arrays[name][:own]
            padded[name][first : first + counts.num_decodes] = arrays[name][own:]
    for name, dtype in DRAW_DTYPES.items():
        padded[name] = np.zeros(shape.num_draws, dtype=dtype)
        padded[name][graph_rows] = arrays[name]
    if shape.num_prefills:
        starts = _row_starts(arrays["query_start_loc"][: counts.num_prefills + 1], shape)
        if shape.num_verifies:
            return padded | {"query_start_loc": starts, "logits_indices": np.arange(shape.num_tokens)}
        snapshots = np.full((SNAPSHOTS, arrays["snapshots"].shape[1]), -1, dtype=np.int32)
        snapshots[: len(arrays["snapshots"])] = arrays["snapshots"]
        last = np.maximum(starts[1:] - 1, 0).astype(np.int64)
        return padded | {"query_start_loc": starts, "logits_indices": last, "snapshots": snapshots}
    return padded | {name: np.zeros(shape.num_rows, dtype=dtype) for name, dtype in CELL_DTYPES.items()}


def _row_starts(own: np.ndarray, shape: GraphShape) -> np.ndarray:
    """query_start_loc of a shape: the prompts at `own`, empty rows after them, the last with all that is left. After
    rows with drafts the padding's take what is left together."""
    starts = np.full(shape.num_rows + 1, own[-1], dtype=np.int32)
    starts[: len(own)] = own
    if shape.num_verifies:  # no row may be longer than what a ring holds
        padding = own[-1] + VERIFY_TOKENS * np.arange(1, len(starts) - len(own) + 1)
        starts[len(own) :] = np.minimum(padding, shape.num_tokens)
        return starts
    starts[shape.num_prefills :] = np.arange(shape.num_prefill_tokens, shape.num_tokens + 1)
    return starts


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device, since cuBLAS keeps a workspace for each stream. PyTorch's own default is
    one for the process, on the first device that captured."""
    return torch.cuda.Stream(device)


def record(function: Callable[[], Computed], pool: Any, device: torch.device) -> tuple[Callable[[], None], Computed]:
    """(what computes it again, where the results then are). Runs `function` once before, to compile."""
    function()
    graph = torch.cuda.CUDAGraph()
    with _without_collections(), torch.cuda.graph(graph, pool=pool, stream=_capture_stream(device)):
        results = function()
    return graph.replay, results


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """What one would find, such as another engine's pinned memory, cannot be freed while something is captured."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class StepGraphs:
    """`step` for some shapes, in the order of `graph_shapes`, captured on construction."""

    def __init__(
        self,
        step: Step,
        shapes: Sequence[GraphShape],
        tables: BlockTables,
        device: torch.device,
        *,
        progress: bool = False,
    ) -> None:
        self.device = device
        self.shapes = shapes
        most_draws = max(shape.num_draws for shape in self.shapes)
        self.tables = tables
        self.logits: Tensor | None = None  # of the last replay; one for all graphs, since a vocabulary is large
        self.padding: dict[GraphShape, Padding] = {}  # this and the next: of shapes without prompts
        self.staging: dict[GraphShape, StagingPool] = {}
        self._most_draws = most_draws
        self._graphs: dict[GraphShape, tuple[Callable[[], None], Computed]] = {}
        self._inputs: dict[GraphShape, Tensor] = {}
        self._cells: dict[GraphShape, tuple[Tensor, Tensor]] = {}
        self._batches: dict[GraphShape, ForwardBatch] = {}  # a graph knows addresses alone: these keep the tensors
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        for shape in tqdm(self.shapes[::-1], desc="CUDA graphs", disable=not progress):  # the largest shapes the pool
            self._capture(step, shape, pool)

    def shape_for(self, counts: Counts) -> GraphShape | None:
        """The smallest graph that holds such a step, or None."""
        return next((shape for shape in self.shapes if shape.holds(counts)), None)

    def shape_of_decodes(self, num_rows: int) -> GraphShape | None:
        """The smallest for so many decoding rows alone, or None."""
        return self.shape_for(Counts(0, 0, num_rows, max_query_len=1))

    def replay(self, shape: GraphShape, packed: Tensor, *, brings_cells: bool = False) -> Computed:
        """Results of every row of the shape.

        packed: the arrays of `pad`, packed, on the device or in pinned memory that keeps them until the step has run.
        `brings_cells`: those of a shape without prompts hold new cells of the block tables.
        """
        self._inputs[shape].copy_(packed, non_blocking=True)
        if brings_cells:
            self.tables.write(*self._cells[shape])
        compute, results = self._graphs[shape]
        compute()
        return results

    def _capture(self, step: Step, shape: GraphShape, pool: Any) -> None:
        arrays = _padding_alone(shape)
        host = np.zeros(packed_size(arrays), dtype=np.uint8)
        pack(arrays, host)
        self._inputs[shape] = torch.from_numpy(host).to(self.device)
        static = Upload(arrays, self._inputs[shape])
        tensors = {name: static[name] for name in arrays}
        tensors.setdefault("snapshots", torch.empty(0, 3, dtype=torch.int32, device=self.device))
        if not shape.num_prefills:  # the same in every step
            starts = torch.arange(shape.num_rows + 1, dtype=torch.int32, device=self.device)
            tensors |= {"query_start_loc": starts, "logits_indices": starts[:-1].long()}
            self.padding[shape] = Padding(arrays, host.copy())  # on a CPU the inputs are `host` itself
            self.staging[shape] = StagingPool(host.size, shape.num_rows, self.device)
            self._cells[shape] = (static["cells"], static["blocks"])
        counts = Counts(shape.num_prefills, shape.num_prefill_tokens, shape.num_decodes, shape.num_prefill_tokens or 1)
        if shape.num_verifies:
            drafted = {"num_drafted": counts.num_prefills, "num_drafted_tokens": counts.num_prefill_tokens}
            counts = dataclasses.replace(counts, max_query_len=VERIFY_TOKENS, **drafted)
        batch = make_batch(tensors, counts, self.tables.table)
        draw = Draw(*(static[name] for name in Draw._fields))

        def compute() -> Computed:
            logits, tokens = step(batch, draw)
            if self.logits is None:
                self.logits = logits.new_empty(self._most_draws, logits.shape[1])
            self.logits[: shape.num_draws].copy_(logits)
            return Computed(self.logits[: shape.num_draws], tokens)

        self._batches[shape] = batch
        self._graphs[shape] = record(compute, pool, self.device)


def _padding_alone(shape: GraphShape) -> Arrays:
    """The arrays of `pad` for a step without rows."""
    names = (*TOKEN_DTYPES, *ROW_DTYPES, *DRAW_DTYPES)
    nothing: Arrays = {name: np.empty(0) for name in names} | {
        "query_start_loc": np.zeros(1, dtype=np.int32),
        "snapshots": np.empty((0, len(StepSave._fields)), dtype=np.int32),
    }
    return pad(nothing, Counts(0, 0, 0, max_query_len=1), shape, np.empty(0, dtype=np.int64))
