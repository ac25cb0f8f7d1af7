"""The format of a saved session: a safetensors file whose metadata hold the model's fingerprint and checksums.

    layers.<i>.<part>   [n, *shape]   a slot part after each of `ends` tokens; the last end is N
    layers.<i>.<part>   [N, *shape]   a token part
    tokens              [N] int32

The slot parts of all layers come first, then the token parts, then `tokens`. The data are cut into pieces, each with a
checksum. The header is written last, so an unfinished file has none.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from ...models.loading.header import DTYPES
from ...models.mixers.cache import CacheSpec, Part
from ..memory.pools import DTypes

FORMAT = "leyden.session"
VERSION = 2  # 1 had one tensor for the states of all layers
MAX_STATES = 2  # after the answer, and at the snapshot before, which is usually the end of its prompt
PIECE_BYTES = 8 << 20  # most bytes of a piece; part of the format, because each piece has a checksum
TOKENS = "tokens"  # name of the tensor of token ids
WORDS = 512  # words of 8 bytes per sum of a checksum
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Metadata(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`checksums`: 8 hexadecimal digits per piece, in the file's order; the last 8 belong to `tokens`."""

    version: int
    fingerprint: str
    cache_salt: str | None
    ends: list[int]
    checksums: str


class Stretch(NamedTuple):
    """The bytes of a slot part of one state, or of a token part of all tokens, of one layer."""

    layer: int
    part: int  # index among the layer's slot parts, or among its token parts
    state: int | None  # index of the state; None = a token part
    offset: int  # bytes from the beginning of the file's data
    num_rows: int
    row_bytes: int

    def pieces(self) -> list[Piece]:
        """Cut the stretch into pieces of at most PIECE_BYTES bytes, but of one row at least."""
        step = max(1, PIECE_BYTES // self.row_bytes)
        starts = range(0, self.num_rows, step)
        return [Piece(self, start, min(step, self.num_rows - start)) for start in starts]


class Piece(NamedTuple):
    """Consecutive rows of a stretch. They are moved at once and have one checksum."""

    stretch: Stretch
    start: int  # first row
    num_rows: int

    @property
    def offset(self) -> int:
        """Bytes from the beginning of the file's data."""
        return self.stretch.offset + self.start * self.stretch.row_bytes

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.stretch.row_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """The contents of every session of this engine."""

    fingerprint: str  # of the model
    caches: list[CacheSpec]  # by layer
    dtypes: DTypes  # of parts in a snapshot
    vocab_size: int
    max_model_len: int

    def parts(self) -> Iterator[tuple[int, int, Part, bool]]:
        """(layer, index of the part in the layer, part, whether it is a slot part) of each part, in the file's
        order."""
        for i, cache in enumerate(self.caches):
            yield from ((i, j, part, True) for j, part in enumerate(cache.slot))
        for i, cache in enumerate(self.caches):
            yield from ((i, j, part, False) for j, part in enumerate(cache.token))

    def tensors(self, num_tokens: int, num_states: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype and shape of every tensor by its name, in the file's order."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for layer, _, part, is_slot in self.parts():
            count = num_states if is_slot else num_tokens
            found[_tensor_name(layer, part)] = (self.dtypes.of(part), (count, *part.shape))
        return found | {TOKENS: (torch.int32, (num_tokens,))}

    def is_state(self, name: str) -> bool:
        """Whether the tensor holds a recurrent state, so that its dtype is the setting `snapshot_dtype`."""
        return any(part.holds == "state" and name == _tensor_name(layer, part) for layer, _, part, _ in self.parts())

    def pieces(self, num_tokens: int, num_states: int) -> list[Piece]:
        """The pieces of all tensors except `tokens`, which is one more piece at the end."""
        return [piece for stretch in self._stretches(num_tokens, num_states) for piece in stretch.pieces()]

    def _stretches(self, num_tokens: int, num_states: int) -> Iterator[Stretch]:
        offset = 0
        for layer, j, part, is_slot in self.parts():
            itemsize = self.dtypes.of(part).itemsize
            for state in range(num_states) if is_slot else [None]:
                rows = part.shape[0] if is_slot else num_tokens
                row_bytes = (math.prod(part.shape[1:]) if is_slot else part.size) * itemsize
                yield Stretch(layer, j, state, offset, rows, row_bytes)
                offset += rows * row_bytes


def _tensor_name(layer: int, part: Part) -> str:
    return f"layers.{layer}.{part.name}"


def checksum(data: np.ndarray) -> int:
    """The checksum of bytes [N] uint8: a CRC-32 of the sums (modulo 2^64) of every 512 words of 8 bytes, and of the
    bytes after them. It detects any single wrong byte and any two exchanged pages, at the speed of memory."""
    whole = len(data) // (8 * WORDS) * 8 * WORDS
    sums = np.add.reduce(data[:whole].view(np.uint64).reshape(-1, WORDS), axis=1)
    return zlib.crc32(data[whole:].tobytes(), zlib.crc32(sums.tobytes()))


def make_header(layout: Layout, num_tokens: int, ends: list[int], salt: str | None, checksums: list[int]) -> bytes:
    """The bytes of the file before its data. Their number does not depend on the values of the checksums."""
    metadata = Metadata(
        version=VERSION,
        fingerprint=layout.fingerprint,
        cache_salt=salt,
        ends=ends,
        checksums="".join(f"{value:08x}" for value in checksums),
    )
    text = msgspec.json.encode(metadata).decode()
    signed = {"format": FORMAT, "session": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    fields: dict[str, Any] = {"__metadata__": signed}
    offset = 0
    for name, (dtype, shape) in layout.tensors(num_tokens, len(ends)).items():
        size = math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(fields, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded
