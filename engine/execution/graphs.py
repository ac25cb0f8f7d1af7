"""CUDA graphs of whole steps: one launch instead of hundreds.

A graph is bound to shapes and addresses. So each of a few shapes has a graph over static inputs, and a step runs in the
smallest shape that holds it. The rows of a shape that a step does not use are padding rows with slot -1: the kernels
write zeros for them, and nothing into the pools. Decode rows alone have graphs of many sizes. Steps with prompts have
fewer, up to the number of tokens from which launching kernel by kernel is as fast.
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
    """Results of all draws of a step, padding included."""

    logits: Tensor  # [N, V]: after each row's last token; of verify rows after each token
    tokens: Tensor  # [N] int32, drawn from these logits without bias, penalties or grammar


Step = Callable[[ForwardBatch, SamplingInputs], StepResult]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of all captures on a device, because cuBLAS keeps a workspace for each stream. PyTorch's default
    capture stream belongs to the first device that captured in this process."""
    return torch.cuda.Stream(device)


def record(
    function: Callable[[], StepResult], pool: Any, device: torch.device
) -> tuple[Callable[[], None], StepResult]:
    """Capture `function` in a graph, after one run that compiles its kernels. Returns the call that replays the graph,
    and the tensors that then hold the results."""
    function()
    graph = torch.cuda.CUDAGraph()
    with _without_collections(), torch.cuda.graph(graph, pool=pool, stream=_capture_stream(device)):
        results = function()
    return graph.replay, results


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection during a capture: one might free pinned memory, such as another engine's, and fail."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class StepGraphs:
    """Graphs of `step` for `shapes` (increasing, as `graph_shapes` gives them), captured on construction."""

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
        self.logits: Tensor | None = None  # of the last replay; all graphs share it, since a vocabulary is large
        self.staging: dict[GraphShape, StagingPool] = {}  # for shapes without prompts
        self._host_inputs = GraphInputs(shapes)
        self._most_draws = most_draws
        self._graphs: dict[GraphShape, tuple[Callable[[], None], StepResult]] = {}
        self._inputs: dict[GraphShape, Tensor] = {}
        self._cells: dict[GraphShape, tuple[Tensor, Tensor]] = {}
        self._batches: dict[GraphShape, ForwardBatch] = {}  # keeps the tensors alive: a graph holds addresses alone
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        # The largest first: its buffers make the pool that the others reuse.
        for shape in tqdm(self.shapes[::-1], desc="CUDA graphs", disable=not progress):
            self._capture(step, shape, pool)

    def replay(self, shape: GraphShape, packed: Tensor, *, brings_cells: bool = False) -> StepResult:
        """Compute a step; returns the results of all draws of the shape, valid until the next replay.

        packed: [..] uint8, the arrays of `pad`, on the device, or in pinned memory that stays unchanged until the step
        has run. brings_cells: `packed` holds new cells of the block tables (only shapes without prompts have a place).
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
