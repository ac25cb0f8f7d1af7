"""Named arrays of a step, packed into one buffer of bytes and sent to the device in one copy."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]
ALIGNMENT = 16  # bytes; Triton specialises kernels on addresses that are multiples of it
_DTYPES = {
    torch.empty(0, dtype=dtype).numpy().dtype: dtype
    for dtype in (torch.int64, torch.int32, torch.float32, torch.bool, torch.uint8)
}


class Upload:
    """Arrays on the device, packed into one buffer of bytes. `upload[name]` is a view of one array as a tensor."""

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
    """Send all arrays to the device in one copy; on CUDA from pinned memory, without waiting."""
    is_cuda = device.type == "cuda"
    host = torch.empty(packed_size(arrays), dtype=torch.uint8, pin_memory=is_cuda)
    pack(arrays, host.numpy())
    return Upload(arrays, host.to(device, non_blocking=True))


@functools.cache
def _empty(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def packed_size(arrays: Arrays) -> int:
    """The number of bytes that `pack` writes."""
    return _starts(arrays)[-1]


def pack(arrays: Arrays, buffer: np.ndarray) -> None:
    """Write the arrays one after another, each aligned, into a buffer [>= packed_size] uint8."""
    for array, start in zip(arrays.values(), _starts(arrays), strict=False):
        if array.size:
            buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def packed(arrays: Arrays) -> np.ndarray:
    """Pack the arrays into a new buffer, [packed_size] uint8."""
    buffer = np.zeros(packed_size(arrays), dtype=np.uint8)
    pack(arrays, buffer)
    return buffer


def unpack(arrays: Arrays, buffer: np.ndarray) -> Arrays:
    """Views of the arrays that `pack` wrote to the buffer. `arrays` gives their names, dtypes and sizes."""
    return {
        name: buffer[start : start + array.nbytes].view(array.dtype)
        for (name, array), start in zip(arrays.items(), _starts(arrays), strict=False)
    }


def _starts(arrays: Arrays) -> list[int]:
    """The first byte of each array, and the end of the last."""
    padded = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays.values()]
    return list(itertools.accumulate(padded, initial=0))
