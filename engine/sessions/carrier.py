"""Bytes of a session, between the pools and its file, while steps go on.

As in `models.weight_reader` a few threads each move a piece at a time through a staging buffer of their own, on a
stream beside that of the steps. What they read or write is held (`prefix_cache.Hold`): no step writes to it meanwhile.
On CUDA keys and values are gathered from their blocks, or scattered to them, on the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...kernels import use_device
from ...models.loading.reader import NUM_READERS
from ..memory.pools import KVPool, SnapshotPool
from .file import (
    PIECE_BYTES,
    Layout,
    SessionHeader,
    checksum,
    make_header,
    read_piece,
    rows_per_piece,
)
from .folder import new_file

T = TypeVar("T")


def device_bytes(max_model_len: int) -> int:
    """That this takes on a CUDA device: a buffer per thread, and where each token is."""
    return NUM_READERS * PIECE_BYTES + 8 * max_model_len


class Place(NamedTuple):
    """Where a session lies in the pools. `slots` [N] int64: block * block_size + place in it, of each token."""

    snapshots: list[int]
    slots: np.ndarray


class Piece(NamedTuple):
    """What is moved at a time: rows [R, ...] of a pool, or those at `slots` [N] int64, from `offset` of the file's data
    on."""

    offset: int
    rows: Tensor
    slots: Tensor | None

    @property
    def num_rows(self) -> int:
        return len(self.rows) if self.slots is None else len(self.slots)

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.rows[0].nbytes


class Carrier:
    """Moves sessions, one at a time, in whatever thread asks."""

    def __init__(self, snapshots: SnapshotPool, kv: KVPool) -> None:
        device = kv.key.device
        self._snapshots, self._kv, self._device = snapshots, kv, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: SimpleQueue[_Staging] = SimpleQueue()
        for _ in range(NUM_READERS):
            self._free.put(_Staging(device, self._stream))

    def mark(self) -> Callable[[], None]:
        """Waits, in any thread, until the device has done what it was told before this call."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def save(
        self, path: Path, layout: Layout, tokens: np.ndarray, ends: list[int], salt: str | None, place: Place
    ) -> int:
        """Write the session's file. Returns its bytes. Raises `SessionError`; then what was there before is still."""
        pieces = self._pieces(place)
        blank = make_header(layout, len(tokens), ends, salt, [0] * (len(pieces) + 1))
        with new_file(path) as file:

            def write(piece: Piece, staging: _Staging) -> int:
                data = staging.fetch(piece)
                _write(file, len(blank) + piece.offset, data)
                return checksum(data)

            checksums = self._move(write, pieces)
            at = len(blank) + sum(piece.nbytes for piece in pieces)
            _write(file, at, tokens.view(np.uint8))
            checksums.append(checksum(tokens.view(np.uint8)))
            _write(file, 0, np.frombuffer(make_header(layout, len(tokens), ends, salt, checksums), dtype=np.uint8))
        return at + tokens.nbytes

    def load(self, header: SessionHeader, place: Place) -> None:
        """Read states, keys and values to their places. `place` may want the last states alone. Raises `SessionError`;
        then anything may lie there."""
        unwanted = len(header.ends) - len(place.snapshots)
        pieces = self._pieces(place, unwanted)
        start = header.stored["states"].offset
        skipped = len(header.checksums) - 1 - len(pieces)
        expected = dict(zip((piece.offset for piece in pieces), header.checksums[skipped:-1], strict=True))

        def read(piece: Piece, staging: _Staging) -> None:
            data = staging.bytes(piece)
            read_piece(header.path, start + piece.offset, data, expected[piece.offset])
            staging.send(piece)

        self._move(read, pieces)

    def _move(self, work: Callable[[Piece, _Staging], T], pieces: list[Piece]) -> list[T]:
        """`work` of every piece. When it raises, nothing is being moved any more, and the first error is raised."""

        @torch.inference_mode()
        def move(piece: Piece) -> T:
            staging = self._free.get()
            try:
                return work(piece, staging)
            finally:
                self._free.put(staging)

        with ThreadPoolExecutor(NUM_READERS, "sessions", use_device, (self._device,)) as threads:
            return list(threads.map(move, pieces))  # an error cancels what has not begun

    def _pieces(self, place: Place, num_skipped: int = 0) -> list[Piece]:
        """All pieces of the data but the tokens, in their order; without those of the first `num_skipped` states."""
        with torch.cuda.stream(self._stream):
            slots = torch.from_numpy(place.slots).to(self._device)
        found: list[Piece] = []
        at = num_skipped * self._snapshots[0].nbytes
        for rows in (self._snapshots[snapshot].flatten(2).flatten(0, 1) for snapshot in place.snapshots):
            for part in rows.split(rows_per_piece(rows[0].nbytes)):
                found.append(Piece(at, part, None))
                at += part.nbytes
        for cache in (*self._kv.key, *self._kv.value):
            rows = cache.flatten(0, 1)
            for some in slots.split(rows_per_piece(rows[0].nbytes)):
                found.append(Piece(at, rows, some))
                at += found[-1].nbytes
        return found


class _Staging:
    """A buffer in host memory, and on CUDA, where it is pinned, another on the device."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        is_cuda = stream is not None
        self._stream = stream
        self._buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
        self._on_device = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device) if is_cuda else None
        self._done = torch.cuda.Event(blocking=True) if is_cuda else None

    def bytes(self, piece: Piece) -> Tensor:
        """[N] uint8, the part of the host's buffer that the piece takes."""
        return self._buffer[: piece.nbytes]

    def fetch(self, piece: Piece) -> np.ndarray:
        """The piece's bytes [N] uint8, until the buffer is used again."""
        host, near = self._views(piece)
        with torch.cuda.stream(self._stream):
            if piece.slots is None:
                host.copy_(piece.rows, non_blocking=True)
            else:
                torch.index_select(piece.rows, 0, piece.slots, out=near)
                if near is not host:
                    host.copy_(near, non_blocking=True)
        self._wait()
        return self.bytes(piece).numpy()

    def send(self, piece: Piece) -> None:
        """What is in the host's buffer to the piece's place."""
        host, near = self._views(piece)
        with torch.cuda.stream(self._stream):
            if piece.slots is None:
                piece.rows.copy_(host, non_blocking=True)
            else:
                if near is not host:
                    near.copy_(host, non_blocking=True)
                piece.rows.index_copy_(0, piece.slots, near)
        self._wait()

    def _views(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """The host's buffer as the piece's rows, and the one beside the pools, on a CPU the same."""
        shape = (piece.num_rows, *piece.rows.shape[1:])
        host = self.bytes(piece).view(piece.rows.dtype).view(shape)
        if self._on_device is None:
            return host, host
        return host, self._on_device[: piece.nbytes].view(piece.rows.dtype).view(shape)

    def _wait(self) -> None:
        if self._done is not None:
            self._done.record(self._stream)
            self._done.synchronize()


def slots_of(blocks: list[int], num_tokens: int, block_size: int) -> np.ndarray:
    """[N] int64: where in the pool, counted in tokens, each token's keys and values are."""
    starts = np.array(blocks, dtype=np.int64) * block_size
    return (starts[:, None] + np.arange(block_size)).reshape(-1)[:num_tokens]


def _write(file: int, offset: int, data: np.ndarray) -> None:
    """All of bytes [N] uint8. Raises OSError."""
    rest = data.data
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count
