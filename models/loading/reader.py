"""Bytes of safetensors files -> tensors on a device, as fast as the disk gives them.

A few threads each read a piece of a tensor into a staging buffer of their own and copy it to its place, so that reads
and copies overlap. The buffers are all the host memory that loading takes, for a model of any size.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...kernels import use_device
from ..errors import CheckpointError
from .checkpoint import refuse_pointer
from .target import Cut, Target

NUM_READERS = 8
BUFFER_BYTES = 16 << 20  # per reader, a multiple of every item's size; large enough for the cost of a call to vanish
MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: `offset` is the byte where its row-major data begins."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, count: int) -> StoredTensor:
        """`count` rows of the first dim from `start`: bytes in one piece."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(count, *self.shape[1:]), offset=self.offset + start * row)

    def row(self, i: int) -> StoredTensor:
        """One row of the first dim, without that dim."""
        return replace(self.rows(i, 1), shape=self.shape[1:])


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a file that one reader moves at a time, and the part of a parameter that it, or its cut, fills."""

    stored: StoredTensor
    part: Tensor
    cut: Cut | None
    plus: float = 0.0


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a file, by its header alone.

    Raises `CheckpointError` for a malformed file. The safetensors library judges: in a header that it accepts sizes fit
    dtypes and shapes, and tensors lie end to end from the header to the end of the file. Their order therefore gives
    the offsets, which the library does not tell.
    """
    try:
        refuse_pointer(path)
        end = path.stat().st_size
        with safe_open(path, framework="pt") as file:
            names = file.offset_keys()
            described = [(name, file.get_slice(name)) for name in names]
            tensors = [(name, entry.get_dtype(), tuple(entry.get_shape())) for name, entry in described]
    except (SafetensorError, OSError) as error:
        cut = "; it ends too early, perhaps by an incomplete download: fetch it again" if _is_cut_off(path) else ""
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}{cut}") from None
    found = []
    for name, code, shape in reversed(tensors):
        if code not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {code}; quantised weights are not supported, "
                "use float32, bfloat16 or float16"
            )
        end -= math.prod(shape) * DTYPES[code].itemsize
        found.append(StoredTensor(path, name, DTYPES[code], shape, end))
    return found[::-1]


def _is_cut_off(path: Path) -> bool:
    """Whether an unreadable file is the beginning of a longer one: its header says where its data should end."""
    malformed = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
    with contextlib.suppress(OSError, *malformed), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size <= 8 or (file.read(1) == b"{" and size < 8 + length):
            return True
        file.seek(8)
        header: dict[str, Any] = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        return bool(size < 8 + length + max(ends))
    return False


def fill(pairs: list[tuple[StoredTensor, Target]], device: torch.device, advance: Callable[[int], object]) -> None:
    """Copy every stored tensor, or its cut, into the target's view, which lies on `device`, converting its dtype there.
    `advance` is called with each number of bytes read. Raises `CheckpointError` when a file cannot be read."""
    stream = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # work that is under way on that memory
        stream = torch.cuda.Stream(device)
    free: SimpleQueue[_Staging] = SimpleQueue()
    for _ in range(NUM_READERS):
        free.put(_Staging(stream))

    def move(piece: Piece) -> int:
        staging = free.get()
        try:
            return staging.move(piece)
        finally:
            free.put(staging)

    with ThreadPoolExecutor(NUM_READERS, "weights", use_device, (device,)) as readers:
        for num_bytes in readers.map(move, _pieces(pairs)):  # an error cancels the pieces that have not begun
            advance(num_bytes)


class _Staging:
    """A buffer between a file and the device. On CUDA it is pinned, and `stream` carries the copies."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream
        self.buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=stream is not None)
        self.arrived = torch.cuda.Event(blocking=True) if stream is not None else None

    @torch.inference_mode()  # of this thread: the caller may have made the tensors in it
    def move(self, piece: Piece) -> int:
        """Read a piece, copy it to its part, and wait until the buffer may be used again.

        Host memory of the stored dtype is read into directly. Returns the number of bytes read.
        """
        stored, part, cut = piece.stored, piece.part, piece.cut
        num_bytes = stored.nbytes
        is_plain = cut is None and not piece.plus
        if is_plain and part.device.type == "cpu" and part.dtype == stored.dtype and part.is_contiguous():
            flat = part.as_strided((part.numel(),), (1,))  # a lone item may have any stride
            read(stored.path, stored.offset, flat.view(torch.uint8))
            return num_bytes
        read(stored.path, stored.offset, self.buffer[:num_bytes])
        items = self.buffer[:num_bytes].view(stored.dtype).view(stored.shape)
        if cut is not None:
            items = cut.part(items)
        with torch.cuda.stream(self.stream):
            part.copy_(items, non_blocking=True)
            if piece.plus:
                part.add_(piece.plus)
            if self.arrived is not None:
                self.arrived.record()
        if self.arrived is not None:
            self.arrived.synchronize()
        return num_bytes


def read(path: Path, offset: int, into: Tensor) -> None:
    """Fill a host tensor of bytes from byte `offset` of the file, without the interpreter's lock. Raises
    `CheckpointError`."""
    buffer = into.numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            while buffer:
                count = os.preadv(file.fileno(), [buffer], offset)
                if count == 0:
                    raise CheckpointError(f"{path} ends before byte {offset + len(buffer)}: it is being changed")
                buffer, offset = buffer[count:], offset + count
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def read_bytes(stored: StoredTensor, target: Target) -> int:
    """Bytes that `fill` reads for this target: of rows it reads its own alone, of columns all."""
    cut = target.cut
    return stored.nbytes // cut.of if cut is not None and cut.dim == 0 else stored.nbytes


def _pieces(pairs: list[tuple[StoredTensor, Target]]) -> Iterator[Piece]:
    """Pieces that fit a buffer, in the order of the files."""
    for stored, target in sorted(pairs, key=lambda pair: (pair[0].path, pair[0].offset)):
        for rows, view in _blocks(stored, target):
            for piece in _split(rows, view, target.cut, BUFFER_BYTES // stored.dtype.itemsize):
                yield replace(piece, plus=target.plus)


def _blocks(stored: StoredTensor, target: Target) -> Iterator[tuple[StoredTensor, Tensor]]:
    """The target's views, each with the stored rows that fill it."""
    if not target.behind:
        yield stored, target.view
        return
    start = 0
    for view in target.views:
        yield stored.rows(start, view.shape[0]), view
        start += view.shape[0]


def _split(stored: StoredTensor, view: Tensor, cut: Cut | None, limit: int) -> Iterator[Piece]:
    """Pieces of at most `limit` stored items, in row-major order."""
    if cut is not None and cut.dim == 0:
        stored, cut = stored.rows(cut.index * view.shape[0], view.shape[0]), None
    num_items = math.prod(stored.shape)
    if num_items <= limit:
        yield Piece(stored, view, cut)
        return
    if cut is None and view.is_contiguous():
        stored, view = replace(stored, shape=(num_items,)), view.view(-1)
    num_rows = limit // math.prod(stored.shape[1:])
    if num_rows:
        for start in range(0, stored.shape[0], num_rows):
            part = view[start : start + num_rows]
            yield Piece(stored.rows(start, part.shape[0]), part, cut)
    else:
        inner = replace(cut, dim=cut.dim - 1) if cut is not None else None
        for i, row in enumerate(view):
            yield from _split(stored.row(i), row, inner, limit)
