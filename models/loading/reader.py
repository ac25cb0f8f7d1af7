"""Bytes of safetensors files -> tensors on a device, as fast as the disk gives them.

A few threads each read a piece of a tensor into a staging buffer of their own and copy it to its place, so that reads
and copies overlap. The buffers are all the host memory that loading takes, for a model of any size. Only a matrix that
must be read whole takes more where it is larger than a buffer, and such matrices are read one at a time.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import use_device
from ...kernels.bundles import Weight
from ..errors import CheckpointError
from .formats.encoded import Encoded
from .header import StoredTensor
from .matrices import MatrixPiece, matrix_pieces, store
from .target import Cut, Place, Target

NUM_READERS = 8
BUFFER_BYTES = 16 << 20  # per reader, a multiple of every item's size; large enough for the cost of a call to vanish
ALIGNMENT = 16  # of tensors that share a buffer, in bytes


class Match(NamedTuple):
    """A stored tensor, or a quantised matrix, and its target."""

    stored: StoredTensor | Encoded
    target: Target

    @property
    def nbytes(self) -> int:
        """Bytes that `fill` reads: of a cut of rows its own alone, of columns all."""
        if isinstance(self.stored, Encoded):
            return sum(part.stored.nbytes for part in self.stored.tensors.values())
        cut = self.target.cut
        return self.stored.nbytes // cut.of if cut is not None and cut.dim == 0 else self.stored.nbytes

    @property
    def is_dequantised(self) -> bool:
        """Whether a quantised matrix becomes a plain parameter."""
        return isinstance(self.stored, Encoded) and not isinstance(self.target.view, Weight)

    @property
    def position(self) -> tuple[Path, int]:
        """File and offset of the first byte."""
        stored = self.stored.stored if isinstance(self.stored, Encoded) else self.stored
        return stored.path, stored.offset


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a file that one reader moves at a time, and the part of a parameter that it, or its cut, fills."""

    stored: StoredTensor
    part: Tensor
    cut: Cut | None
    plus: float = 0.0


def fill(matches: list[Match], device: torch.device, advance: Callable[[int], object]) -> None:
    """Copy every stored tensor, or its cut, into the target's view, which lies on `device`, converting its dtype there.
    Matrices are dequantised or quantised there, too, some million items at a time, or whole where their layout asks
    for that.

    `advance` is called with each number of bytes read. Raises `CheckpointError` when a file cannot be read."""
    stream = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # work that is under way on that memory
        stream = torch.cuda.Stream(device)
    free: SimpleQueue[_Staging] = SimpleQueue()
    for _ in range(NUM_READERS):
        free.put(_Staging(stream))

    whole = threading.Lock()  # of matrices that no buffer holds, so that one at a time takes memory of its size

    def move(piece: Piece | MatrixPiece) -> int:
        staging = free.get()
        try:
            if not isinstance(piece, MatrixPiece):
                return staging.move(piece)
            with whole if piece.nbytes > BUFFER_BYTES else contextlib.nullcontext():
                return staging.move_matrix(piece)
        finally:
            free.put(staging)

    with ThreadPoolExecutor(NUM_READERS, "weights", use_device, (device,)) as readers:
        for num_bytes in readers.map(move, _pieces(matches)):  # an error cancels the pieces that have not begun
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

    @torch.inference_mode()
    def move_matrix(self, piece: MatrixPiece) -> int:
        """Read the tensors of some rows of a matrix, and store what they encode. Returns the number of bytes read."""
        stored = piece.tensors()
        ends, total = {}, 0
        for role, tensor in stored.items():
            ends[role] = total + tensor.nbytes
            total += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        host = self.buffer[:total] if total <= len(self.buffer) else torch.empty(total, dtype=torch.uint8)
        for role, tensor in stored.items():
            read(tensor.path, tensor.offset, host[ends[role] - tensor.nbytes : ends[role]])
        with torch.cuda.stream(self.stream):
            there = host.to(piece.device, non_blocking=True)
            parts = {
                role: there[ends[role] - tensor.nbytes : ends[role]].view(tensor.dtype).view(tensor.shape)
                for role, tensor in stored.items()
            }
            store(piece, parts)
            if self.arrived is not None:
                self.arrived.record()
        if self.arrived is not None:
            self.arrived.synchronize()
        return piece.nbytes


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


def _pieces(matches: list[Match]) -> Iterator[Piece | MatrixPiece]:
    """Pieces that fit a buffer, in the order of the files."""
    for stored, target in sorted(matches, key=lambda match: match.position):
        if isinstance(stored, Encoded):
            yield from matrix_pieces(stored, target)
            continue
        for rows, view in _blocks(stored, target):
            for piece in _split(rows, view, target.cut, BUFFER_BYTES // stored.dtype.itemsize):
                yield replace(piece, plus=target.plus)


def _blocks(stored: StoredTensor, target: Target) -> Iterator[tuple[StoredTensor, Tensor]]:
    """The target's views, each with the stored rows that fill it."""
    if not target.behind:
        yield stored, _plain(target.view)
        return
    start = 0
    for view in map(_plain, target.views):
        yield stored.rows(start, view.shape[0]), view
        start += view.shape[0]


def _plain(view: Place) -> Tensor:
    assert not isinstance(view, Weight), "a quantised matrix is filled from an `Encoded`"
    return view


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
