"""Scheduled sequences -> ForwardBatch: built on the host in plain arrays, sent to the device in one copy."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.forward_batch import ForwardBatch
from ..memory.operations import StepSave
from ..scheduling.step import ScheduledBatch
from ..sequence import Sequence

Arrays = dict[str, np.ndarray]
ALIGNMENT = 16  # bytes; Triton specialises on it
_DTYPES = {
    torch.empty(0, dtype=dtype).numpy().dtype: dtype for dtype in (torch.int64, torch.int32, torch.float32, torch.bool)
}
BATCH_TENSORS = (
    "input_ids",
    "positions",
    "query_start_loc",
    "context_lens",
    "has_initial_state",
    "state_indices",
    "num_pending",
    "slot_mapping",
    "logits_indices",
    "snapshots",
)


@dataclass(frozen=True, slots=True)
class Counts:
    """The fields of `ForwardBatch` that stay on the host."""

    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    max_query_len: int
    num_drafted: int = 0
    num_drafted_tokens: int = 0


def make_batch(tensors: Upload | dict[str, Tensor], counts: Counts, block_table: Tensor) -> ForwardBatch:
    """The batch contract of `models.forward_batch` for one step. tensors: those of `batch_arrays`."""
    fields = {name: tensors[name] for name in BATCH_TENSORS}
    return ForwardBatch(**fields, block_table=block_table, **dataclasses.asdict(counts))  # type: ignore[arg-type]


def count_rows(scheduled: ScheduledBatch) -> Counts:
    prefill_counts = scheduled.num_scheduled_tokens[: scheduled.num_prefills]
    return Counts(
        num_prefills=scheduled.num_prefills,
        num_prefill_tokens=sum(prefill_counts),
        num_decodes=scheduled.num_decodes,
        max_query_len=max(prefill_counts, default=1),
        num_drafted=scheduled.num_drafted,
        num_drafted_tokens=sum(prefill_counts) if scheduled.num_drafted else 0,
    )


def batch_arrays(scheduled: ScheduledBatch, block_size: int) -> Arrays:
    """The tensors of `ForwardBatch` in numpy, but for the block table. Asks only the sequences' own counters.

    A decode row whose token the host has not seen has input id -1: its slot's last token stands for it.
    """
    sequences, counts = scheduled.sequences, scheduled.num_scheduled_tokens
    context_lens = _ints([sequence.num_computed_tokens for sequence in sequences])
    query_start_loc = np.arange(len(sequences) + 1, dtype=np.int32)
    logits_indices = rows = np.arange(len(sequences))  # rows [T], the row of each token
    positions = context_lens.astype(np.int64)
    if scheduled.num_prefills:
        np.cumsum(counts, out=query_start_loc[1:])
        logits_indices = query_start_loc[1:].astype(np.int64)[scheduled.completing_rows] - 1
        rows = np.repeat(rows, counts)
        if scheduled.num_drafted:
            logits_indices = np.arange(len(rows))
        positions = np.arange(len(rows)) + (positions - query_start_loc[:-1])[rows]
    return {
        "input_ids": _input_ids(sequences, counts, scheduled.num_prefills),
        "positions": positions,
        "slot_mapping": _slot_mapping(sequences, context_lens, counts, rows, positions, block_size),
        "logits_indices": logits_indices,
        "query_start_loc": query_start_loc,
        "context_lens": context_lens,
        "state_indices": _ints([sequence.state_slot for sequence in sequences]),
        "num_pending": _ints([sequence.num_pending_tokens for sequence in sequences]),
        "has_initial_state": context_lens > 0,
        "snapshots": np.array(scheduled.snapshots, dtype=np.int32).reshape(-1, len(StepSave._fields)),
    }


def _ints(values: list[Any]) -> np.ndarray:
    """[N] int32; half the time of np.array."""
    return np.fromiter(values, np.int32, len(values))


def _slot_mapping(
    sequences: list[Sequence],
    context_lens: np.ndarray,
    counts: list[int],
    rows: np.ndarray,
    positions: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """[T] int64, block * block_size + offset of each token. Looks at the blocks of these tokens alone, however long
    the tables are. rows, positions: [T], of each token."""
    firsts = context_lens // block_size
    ends = (context_lens + counts - 1) // block_size + 1
    spans = zip(sequences, firsts.tolist(), ends.tolist(), strict=True)
    parts = [sequence.block_table[first:end] for sequence, first, end in spans]
    blocks = np.frombuffer(b"".join(parts), dtype=np.int32).astype(np.int64)
    places = np.cumsum(ends - firsts) - ends  # of each row's block 0, if it were among them
    block, offset = np.divmod(positions, block_size)
    return blocks[places[rows] + block] * block_size + offset


def _input_ids(sequences: list[Sequence], counts: list[int], num_prefills: int) -> np.ndarray:
    parts = [
        np.array(s.token_ids(s.num_computed_tokens, s.num_computed_tokens + count) + s.drafts, dtype=np.int64)
        for s, count in zip(sequences[:num_prefills], counts[:num_prefills], strict=True)
    ]
    decoding = _ints([(s.output_token_ids or s.prompt_token_ids)[-1] for s in sequences[num_prefills:]])
    return np.concatenate([*parts, decoding.astype(np.int64)])


class Upload:
    """Arrays on the device, one after another in one buffer of bytes. Indexing by name makes a tensor of one."""

    def __init__(self, arrays: Arrays, buffer: Tensor) -> None:
        self.buffer = buffer
        self._arrays = arrays
        self._starts = dict(zip(arrays, _starts(arrays), strict=False))

    def __getitem__(self, name: str) -> Tensor:
        array, start = self._arrays[name], self._starts[name]
        if not array.size:
            return _empty(_DTYPES[array.dtype], array.shape, self.buffer.device)
        view = self.buffer[start : start + array.nbytes].view(_DTYPES[array.dtype])
        return view if array.ndim == 1 else view.view(array.shape)


def upload(arrays: Arrays, device: torch.device) -> Upload:
    """Send every array in one copy, on CUDA out of pinned memory and without waiting."""
    is_cuda = device.type == "cuda"
    host = torch.empty(packed_size(arrays), dtype=torch.uint8, pin_memory=is_cuda)
    pack(arrays, host.numpy())
    return Upload(arrays, host.to(device, non_blocking=True))


@functools.cache
def _empty(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def packed_size(arrays: Arrays) -> int:
    """Bytes that `pack` writes."""
    return _starts(arrays)[-1]


def pack(arrays: Arrays, buffer: np.ndarray) -> None:
    """Write the arrays one after another into a buffer of bytes."""
    for array, start in zip(arrays.values(), _starts(arrays), strict=False):
        if array.size:
            buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def unpack(arrays: Arrays, buffer: np.ndarray) -> Arrays:
    """What `pack` wrote of such arrays, in place."""
    return {
        name: buffer[start : start + array.nbytes].view(array.dtype)
        for (name, array), start in zip(arrays.items(), _starts(arrays), strict=False)
    }


def _starts(arrays: Arrays) -> list[int]:
    """Where each array begins, and where the last ends."""
    padded = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays.values()]
    return list(itertools.accumulate(padded, initial=0))
