"""CUDA graphs of decode steps: one launch instead of hundreds.

A graph is bound to shapes and addresses, so there is one for each of a few numbers of rows, over static inputs; a step
takes the smallest that holds it. The rows beyond its own are padding (slot -1): the kernels write zeros for them, and
nothing into the pools.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..models.forward_batch import ForwardBatch
from .batch import Arrays, Counts, Upload, make_batch, pack, packed_size

Forward = Callable[[ForwardBatch], Tensor]

# What a padding row holds. Its token must exist, its position too.
PADDING = {"context_lens": -1, "state_indices": -1, "slot_mapping": -1}
ROW_FIELDS = (
    "input_ids",
    "positions",
    "slot_mapping",
    "context_lens",
    "state_indices",
    "num_pending",
    "has_initial_state",
)


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows worth a graph, increasing: at most 8 rows of padding up to 64, 16 up to 256, then 32."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows, 32)]
    return [*(size for size in steps if size < max_rows), max_rows]


def pad_rows(arrays: Arrays, size: int) -> Arrays:
    """The arrays of a decode step, widened to `size` rows."""
    num_rows = arrays["input_ids"].shape[0]
    padded = {name: np.full(size, PADDING.get(name, 0), dtype=arrays[name].dtype) for name in ROW_FIELDS}
    for name, array in padded.items():
        array[:num_rows] = arrays[name]
    return padded


def empty_rows(size: int) -> Arrays:
    """`size` padding rows."""
    kinds = {"input_ids": np.int64, "positions": np.int64, "slot_mapping": np.int64, "has_initial_state": np.bool_}
    return pad_rows({name: np.empty(0, dtype=kinds.get(name, np.int32)) for name in ROW_FIELDS}, size)


class DecodeGraphs:
    """`forward` (a batch of decode rows -> logits [B, V]) for some numbers of rows, captured on construction."""

    def __init__(
        self,
        forward: Forward,
        sizes: Iterable[int],
        table_width: int,
        device: torch.device,
        *,
        progress: bool = False,
    ) -> None:
        self.device = device
        self.sizes = sorted(sizes)
        self.block_table = torch.zeros(self.sizes[-1], table_width, dtype=torch.int32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._inputs: dict[int, Tensor] = {}
        self._logits: dict[int, Tensor] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in tqdm(self.sizes[::-1], desc="CUDA graphs", disable=not progress):  # the largest shapes the pool
            self._capture(forward, size, pool)

    def size_for(self, num_rows: int) -> int | None:
        """The graph that holds so many rows, or None."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def replay(self, size: int, upload: Upload) -> Tensor:
        """Logits [size, V] of a step whose first arrays are those of `pad_rows`, and whose table is among the rest."""
        table = upload["block_table"]
        self._inputs[size].copy_(upload.buffer[: self._inputs[size].shape[0]])
        self.block_table[: table.shape[0], : table.shape[1]].copy_(table)
        self._graphs[size].replay()
        return self._logits[size]

    def _capture(self, forward: Forward, size: int, pool: Any) -> None:
        arrays = empty_rows(size)
        host = np.zeros(packed_size(arrays), dtype=np.uint8)
        pack(arrays, host)
        self._inputs[size] = torch.from_numpy(host).to(self.device)
        static = Upload(arrays, self._inputs[size])
        tensors = {
            **{name: static[name] for name in ROW_FIELDS},
            "block_table": self.block_table[:size],
            "query_start_loc": torch.arange(size + 1, dtype=torch.int32, device=self.device),
            "logits_indices": torch.arange(size, device=self.device),
        }
        batch = make_batch(tensors, Counts(0, 0, size, prefills_pending=False, max_query_len=1))
        forward(batch)  # compiles; padding rows leave the pools alone
        self._graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graphs[size], pool=pool):
            self._logits[size] = forward(batch)
