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

import torch
from torch import Tensor
from tqdm import tqdm

from ...models.forward_batch import ForwardBatch
from .arrays import Upload
from .block_tables import BlockTables
from .counts import Counts
from .graph_shapes import VERIFY_TOKENS, GraphShape
from .padding import GraphInputs
from .sampler import SamplingInputs
from .staging import StagingPool
from .step_input import make_batch


class StepResult(NamedTuple):
    """What a step computes for each of its draws, those of padding included."""

    logits: Tensor  # [N, V], after a row's last token, of rows with drafts after each token
    tokens: Tensor  # [N] int32, drawn for rows that look at nothing but their logits


Step = Callable[[ForwardBatch, SamplingInputs], StepResult]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device, since cuBLAS keeps a workspace for each stream. PyTorch's own default is
    one for the process, on the first device that captured."""
    return torch.cuda.Stream(device)


def record(
    function: Callable[[], StepResult], pool: Any, device: torch.device
) -> tuple[Callable[[], None], StepResult]:
    """(a call that computes `function` again, the tensors that then hold its results). Runs `function` once before,
    to compile."""
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
        self.staging: dict[GraphShape, StagingPool] = {}  # of shapes without prompts
        self._host_inputs = GraphInputs(shapes)
        self._most_draws = most_draws
        self._graphs: dict[GraphShape, tuple[Callable[[], None], StepResult]] = {}
        self._inputs: dict[GraphShape, Tensor] = {}
        self._cells: dict[GraphShape, tuple[Tensor, Tensor]] = {}
        self._batches: dict[GraphShape, ForwardBatch] = {}  # a graph knows addresses alone: these keep the tensors
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        for shape in tqdm(self.shapes[::-1], desc="CUDA graphs", disable=not progress):  # the largest shapes the pool
            self._capture(step, shape, pool)

    def replay(self, shape: GraphShape, packed: Tensor, *, brings_cells: bool = False) -> StepResult:
        """Results of every row of the shape.

        packed: [..] uint8, the arrays of `pad`, on the device or in pinned memory that keeps them until the step has
        run. `brings_cells`: they hold new cells of the block tables, which a shape with prompts has no place for.
        """
        self._inputs[shape].copy_(packed, non_blocking=True)
        if brings_cells:
            self.tables.write(*self._cells[shape])
        compute, results = self._graphs[shape]
        compute()
        return results

    def _capture(self, step: Step, shape: GraphShape, pool: Any) -> None:
        arrays, packed = self._host_inputs.padding(shape)
        self._inputs[shape] = torch.from_numpy(packed.copy()).to(self.device)
        static = Upload(arrays, self._inputs[shape])
        tensors = {name: static[name] for name in arrays}
        tensors.setdefault("snapshots", torch.empty(0, 3, dtype=torch.int32, device=self.device))
        if not shape.num_prefills:  # the same in every step
            starts = torch.arange(shape.num_rows + 1, dtype=torch.int32, device=self.device)
            tensors |= {"query_start_loc": starts, "logits_indices": starts[:-1].long()}
            self.staging[shape] = StagingPool(packed.size, shape.num_rows, self.device)
            self._cells[shape] = (static["cells"], static["blocks"])
        counts = Counts(shape.num_prefills, shape.num_prefill_tokens, shape.num_decodes, shape.num_prefill_tokens or 1)
        if shape.num_verifies:
            drafted = {"num_drafted": counts.num_prefills, "num_drafted_tokens": counts.num_prefill_tokens}
            counts = dataclasses.replace(counts, max_query_len=VERIFY_TOKENS, **drafted)
        batch = make_batch(tensors, counts, self.tables.table)
        inputs = SamplingInputs(*(static[name] for name in SamplingInputs._fields))

        def compute() -> StepResult:
            logits, tokens = step(batch, inputs)
            if self.logits is None:
                self.logits = logits.new_empty(self._most_draws, logits.shape[1])
            self.logits[: shape.num_draws].copy_(logits)
            return StepResult(self.logits[: shape.num_draws], tokens)

        self._batches[shape] = batch
        self._graphs[shape] = record(compute, pool, self.device)
