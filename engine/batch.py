"""Scheduled sequences -> ForwardBatch: built on the host in plain arrays, sent to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..models.forward_batch import ForwardBatch
from .scheduler import ScheduledBatch
from .sequence import Sequence


def build_batch(scheduled: ScheduledBatch, block_size: int, device: torch.device) -> ForwardBatch:
    """The batch contract of `models.forward_batch` for one step. Asks only the sequences' own counters."""
    sequences, counts = scheduled.sequences, scheduled.num_scheduled_tokens
    starts = [sequence.num_computed_tokens for sequence in sequences]
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    query_start_loc = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start_loc[1:])
    context_lens = np.array(starts, dtype=np.int32)
    spans = list(zip(sequences, starts, ends, strict=True))
    arrays = {
        "input_ids": _concat([np.array(s.token_ids(a, b), dtype=np.int64) for s, a, b in spans]),
        "positions": _concat([np.arange(a, b, dtype=np.int64) for _, a, b in spans]),
        "slot_mapping": _concat([_slot_mapping(s, a, b, block_size) for s, a, b in spans]),
        "logits_indices": query_start_loc[1:].astype(np.int64)[scheduled.completing_rows] - 1,
        "query_start_loc": query_start_loc,
        "context_lens": context_lens,
        "state_indices": np.array([sequence.state_slot for sequence in sequences], dtype=np.int32),
        "num_pending": np.array([sequence.num_pending_tokens for sequence in sequences], dtype=np.int32),
        "block_table": _block_table(sequences),
        "has_initial_state": context_lens > 0,
    }
    prefill_counts = counts[: scheduled.num_prefills]
    return ForwardBatch(
        **_to_device(arrays, device),
        num_prefills=scheduled.num_prefills,
        num_prefill_tokens=sum(prefill_counts),
        num_decodes=len(sequences) - scheduled.num_prefills,
        prefills_pending=any(s.num_pending_tokens for s in sequences[: scheduled.num_prefills]),
        max_query_len=max(prefill_counts, default=1),
    )


def _concat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _slot_mapping(sequence: Sequence, start: int, end: int, block_size: int) -> np.ndarray:
    first = start // block_size
    blocks = np.array(sequence.block_table[first : -(-end // block_size)], dtype=np.int64)
    positions = np.arange(start, end, dtype=np.int64)
    return blocks[positions // block_size - first] * block_size + positions % block_size


def _block_table(sequences: list[Sequence]) -> np.ndarray:
    table = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), dtype=np.int32)
    for row, sequence in enumerate(sequences):
        table[row, : len(sequence.block_table)] = sequence.block_table
    return table


def _to_device(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Every array as a tensor on the device; on CUDA through one pinned buffer, so that a step costs one copy."""
    if device.type != "cuda":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    offsets, total = {}, 0
    for name, array in arrays.items():
        offsets[name] = total
        total += -(-array.nbytes // 16) * 16  # Triton specialises on 16-byte alignment
    host = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    view = host.numpy()
    for name, array in arrays.items():
        view[offsets[name] : offsets[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    buffer = host.to(device, non_blocking=True)
    return {
        name: buffer[offsets[name] : offsets[name] + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for name, array in arrays.items()
    }
