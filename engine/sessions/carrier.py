"""Copies a session between the pools and its file while steps go on.

As in `models.loading.reader`, each of a few threads moves one piece at a time through its own staging buffer, on a
stream beside the steps' stream. A lease (`prefix.cache.Lease`) covers the memory, so no step writes to it meanwhile. On
CUDA, keys and values are gathered from their blocks, or scattered to them, on the device.
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
from ...models.mixers.cache import LayerCache
from ..memory.pools import SnapshotPool
from .folder import new_file
from .format import PIECE_BYTES, Layout, Piece, checksum, make_header
from .reader import SessionHeader, read_piece

T = TypeVar("T")


def device_bytes(max_model_len: int) -> int:
    """Bytes that a carrier takes on a CUDA device: a buffer per thread, and the slot of each token."""
    return NUM_READERS * PIECE_BYTES + 8 * max_model_len


class Location(NamedTuple):
    """A session's memory in the pools. `slots` [N] int64: per token, block * block_size + index within the block."""

    snapshots: list[int]
    slots: np.ndarray


class Transfer(NamedTuple):
    """A piece of the file and its memory: rows [R, ...] of a pool. `slots` [R'] int64 selects some; None = all."""

    piece: Piece
    rows: Tensor
    slots: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.piece.num_rows, *self.rows.shape[1:])


class Carrier:
    """Moves sessions between files and pools, one at a time, with NUM_READERS threads."""

    def __init__(self, snapshots: SnapshotPool, caches: list[LayerCache], device: torch.device) -> None:
        self._snapshots, self._caches, self._device = snapshots, caches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: SimpleQueue[_Staging] = SimpleQueue()
        for _ in range(NUM_READERS):
            self._free.put(_Staging(device, self._stream))

    def mark(self) -> Callable[[], None]:
        """Return a function that waits until the device has done all work launched before this call. Any thread may
        call that function."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize

    def save(
        self, path: Path, layout: Layout, tokens: np.ndarray, ends: list[int], salt: str | None, location: Location
    ) -> int:
        """Write the session's file. Returns its size in bytes. Raises `SessionError`, and then keeps an earlier file of
        the same path."""
        transfers = self._transfers(layout.pieces(len(tokens), len(ends)), location, num_skipped=0)
        blank = make_header(layout, len(tokens), ends, salt, [0] * (len(transfers) + 1))
        with new_file(path) as file:

            def write(transfer: Transfer, staging: _Staging) -> int:
                data = staging.fetch(transfer)
                _write(file, len(blank) + transfer.piece.offset, data)
                return checksum(data)

            checksums = self._move(write, transfers)
            at = len(blank) + sum(transfer.piece.nbytes for transfer in transfers)
            _write(file, at, tokens.view(np.uint8))
            checksums.append(checksum(tokens.view(np.uint8)))
            _write(file, 0, np.frombuffer(make_header(layout, len(tokens), ends, salt, checksums), dtype=np.uint8))
        return at + tokens.nbytes

    def load(self, header: SessionHeader, layout: Layout, location: Location) -> None:
        """Read the states, keys and values of a session to its location. If the location has fewer snapshots than the
        file has states, only the last states are read. Raises `SessionError`; the location's content is then
        undefined."""
        num_skipped = len(header.ends) - len(location.snapshots)
        pieces = layout.pieces(len(header.tokens), len(header.ends))
        expected = dict(zip((piece.offset for piece in pieces), header.checksums, strict=False))

        def read(transfer: Transfer, staging: _Staging) -> None:
            at = transfer.piece.offset
            read_piece(header.path, header.start + at, staging.bytes(transfer), expected[at])
            staging.send(transfer)

        self._move(read, self._transfers(pieces, location, num_skipped))

    def _move(self, work: Callable[[Transfer, _Staging], T], transfers: list[Transfer]) -> list[T]:
        """Run `work` for every transfer, and return the results in order. Raises the first error, after all running
        transfers have ended."""

        @torch.inference_mode()
        def move(transfer: Transfer) -> T:
            staging = self._free.get()
            try:
                return work(transfer, staging)
            finally:
                self._free.put(staging)

        with ThreadPoolExecutor(NUM_READERS, "sessions", use_device, (self._device,)) as threads:
            return list(threads.map(move, transfers))  # an error cancels the transfers that have not begun

    def _transfers(self, pieces: list[Piece], location: Location, num_skipped: int) -> list[Transfer]:
        """The pieces and their memory, except the pieces of the first `num_skipped` states."""
        with torch.cuda.stream(self._stream):
            slots = torch.from_numpy(location.slots).to(self._device)
        found: list[Transfer] = []
        for piece in pieces:
            (layer, part, state, *_), stop = piece.stretch, piece.start + piece.num_rows
            if state is None:
                rows = self._caches[layer].token[part].flatten(0, 1)
                found.append(Transfer(piece, rows, slots[piece.start : stop]))
            elif state >= num_skipped:
                rows = self._snapshots.layer(location.snapshots[state - num_skipped], layer)[part]
                found.append(Transfer(piece, rows[piece.start : stop], None))
        return found


class _Staging:
    """A buffer in host memory. On CUDA it is pinned, and a second buffer lies on the device."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        is_cuda = stream is not None
        self._stream = stream
        self._buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
        self._on_device = torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device) if is_cuda else None
        self._done = torch.cuda.Event(blocking=True) if is_cuda else None

    def bytes(self, transfer: Transfer) -> Tensor:
        """The first bytes of the host's buffer, [N] uint8, as many as the transfer has."""
        return self._buffer[: transfer.piece.nbytes]

    def fetch(self, transfer: Transfer) -> np.ndarray:
        """Copy the transfer's memory to the host's buffer. Returns its bytes [N] uint8, valid until the buffer is used
        again."""
        host, near = self._views(transfer)
        with torch.cuda.stream(self._stream):
            if transfer.slots is None:
                host.copy_(transfer.rows, non_blocking=True)
            else:
                torch.index_select(transfer.rows, 0, transfer.slots, out=near)
                if near is not host:
                    host.copy_(near, non_blocking=True)
        self._wait()
        return self.bytes(transfer).numpy()

    def send(self, transfer: Transfer) -> None:
        """Copy the host's buffer to the transfer's memory."""
        host, near = self._views(transfer)
        with torch.cuda.stream(self._stream):
            if transfer.slots is None:
                transfer.rows.copy_(host, non_blocking=True)
            else:
                if near is not host:
                    near.copy_(host, non_blocking=True)
                transfer.rows.index_copy_(0, transfer.slots, near)
        self._wait()

    def _views(self, transfer: Transfer) -> tuple[Tensor, Tensor]:
        """(the host's buffer, the device's buffer), as rows of the transfer. On a CPU both are the same tensor."""
        host = self.bytes(transfer).view(transfer.rows.dtype).view(transfer.shape)
        if self._on_device is None:
            return host, host
        return host, self._on_device[: transfer.piece.nbytes].view(transfer.rows.dtype).view(transfer.shape)

    def _wait(self) -> None:
        if self._done is not None:
            self._done.record(self._stream)
            self._done.synchronize()


def slots_of(blocks: list[int], num_tokens: int, block_size: int) -> np.ndarray:
    """The slot of each token in the KV pool, counted in tokens: [N] int64."""
    starts = np.array(blocks, dtype=np.int64) * block_size
    return (starts[:, None] + np.arange(block_size)).reshape(-1)[:num_tokens]


def _write(file: int, offset: int, data: np.ndarray) -> None:
    """Write all bytes [N] uint8 at the offset. Raises OSError."""
    rest = data.data
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count
