"""CUDA graphs of decode steps: one launch instead of hundreds.

A graph is bound to shapes and addresses, so there is one for each of a few numbers of rows, over static inputs; a step
takes the smallest that holds it. The rows beyond its own are padding (slot -1): the kernels write zeros for them, and
nothing into the pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..models.forward_batch import ForwardBatch
from .batch import Arrays, Counts, Upload, make_batch, pack, packed_size
from .sampler import Draw


class Decoded(NamedTuple):
    """What a decode step computes."""

    logits: Tensor  # [B, V]
    tokens: Tensor  # [B] int32, drawn as rows want that look at nothing but their logits


DecodeStep = Callable[[ForwardBatch, Draw], Decoded]

# What a padding row holds. Its token must exist, its position too; it is drawn greedily.
PADDING = {"context_lens": -1, "state_indices": -1, "slot_mapping": -1}
ROW_DTYPES = {
    "input_ids": np.int64,
    "positions": np.int64,
    "slot_mapping": np.int64,
    "context_lens": np.int32,
    "state_indices": np.int32,
    "num_pending": np.int32,
    "has_initial_state": np.bool_,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "uniform": np.float32,
}


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows worth a graph, increasing: at most 8 rows of padding up to 64, 16 up to 256, then 32."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows, 32)]
    return [*(size for size in steps if size < max_rows), max_rows]


def pad_rows(arrays: Arrays, size: int) -> Arrays:
    """The arrays of a decode step that hold a value per row, widened to `size` rows."""
    padded: Arrays = {}
    for name, dtype in ROW_DTYPES.items():
        own = arrays[name]
        padded[name] = np.full(size, PADDING.get(name, 0), dtype=dtype)
        padded[name][: len(own)] = own
    return padded


def record(function: Callable[[], Decoded], pool: Any) -> tuple[Callable[[], None], Decoded]:
    """(what computes it again, where the results then are). Runs `function` once before, to compile."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = function()
    return graph.replay, results


class DecodeGraphs:
    """`step` for some numbers of rows, captured on construction."""

    def __init__(
        self,
        step: DecodeStep,
        sizes: Iterable[int],
        table_width: int,
        device: torch.device,
        *,
        progress: bool = False,
    ) -> None:
        self.device = device
        self.sizes = sorted(sizes)
        self.block_table = torch.zeros(self.sizes[-1], table_width, dtype=torch.int32, device=device)
        self.logits: Tensor | None = None  # of the last replay; one for all graphs, since a vocabulary is large
        self._graphs: dict[int, tuple[Callable[[], None], Decoded]] = {}
        self._inputs: dict[int, Tensor] = {}
        self._batches: dict[int, ForwardBatch] = {}  # a graph knows addresses alone: these keep the tensors there
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        for size in tqdm(self.sizes[::-1], desc="CUDA graphs", disable=not progress):  # the largest shapes the pool
            self._capture(step, size, pool)

    def size_for(self, num_rows: int) -> int | None:
        """The graph that holds so many rows, or None."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def replay(self, size: int, upload: Upload) -> Decoded:
        """Results of `size` rows. The first arrays of `upload` are those of `pad_rows`, its table is among the rest."""
        table = upload["block_table"]
        self._inputs[size].copy_(upload.buffer[: self._inputs[size].shape[0]])
        self.block_table[: table.shape[0], : table.shape[1]].copy_(table)
        compute, results = self._graphs[size]
        compute()
        return results

    def _capture(self, step: DecodeStep, size: int, pool: Any) -> None:
        arrays = pad_rows({name: np.empty(0) for name in ROW_DTYPES}, size)
        host = np.zeros(packed_size(arrays), dtype=np.uint8)
        pack(arrays, host)
        self._inputs[size] = torch.from_numpy(host).to(self.device)
        static = Upload(arrays, self._inputs[size])
        rows = torch.arange(size + 1, dtype=torch.int32, device=self.device)
        tensors = {
            **{name: static[name] for name in ROW_DTYPES},
            "block_table": self.block_table[:size],
            "query_start_loc": rows,
            "logits_indices": rows[:size].long(),
        }
        batch = make_batch(tensors, Counts(0, 0, size, prefills_pending=False, max_query_len=1))
        draw = Draw(*(static[name] for name in Draw._fields))

        def compute() -> Decoded:
            logits, tokens = step(batch, draw)
            if self.logits is None:  # the largest comes first, and runs once before it is recorded
                self.logits = torch.empty_like(logits)
            self.logits[:size].copy_(logits)
            return Decoded(self.logits[:size], tokens)

        self._batches[size] = batch
        self._graphs[size] = record(compute, pool)
