"""The file of a saved session: a safetensors file whose metadata says of which model it is and its bytes' checksums.

    layers.<i>.<part>   [n, *shape]   a slot part: after the first `ends[j]` tokens, the last after all of them
    layers.<i>.<part>   [N, *shape]   a token part
    tokens              [N] int32

Slot parts of all layers come first, then token parts. The data are cut into pieces, each with a checksum. The header
is written last, so that an unfinished file has none. Files are untrusted: the library judges the header, everything in
it is compared with the model that would take it, and no buffer is as large as the file claims before that is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...models.errors import CheckpointError
from ...models.loading.reader import DTYPES, StoredTensor, read, read_header
from ...models.mixers.cache import CacheSpec, Part
from ..errors import SessionError
from ..memory.pools import DTypes
from .folder import not_found

FORMAT = "leyden.session"
VERSION = 2  # 1 had one tensor for the states of all layers
MAX_STATES = 2  # the end of the answer, and the one before: its prompt's, when no answer went between
PIECE_BYTES = 8 << 20  # at most, and part of the format: it says where checksums begin
TOKENS = "tokens"  # the tensor of token ids
WORDS = 512  # of 8 bytes, that are summed before they come into the checksum
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Metadata(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`checksums`: 8 hexadecimal digits per piece, in the file's order; the last 8 belong to `tokens`."""

    version: int
    fingerprint: str
    cache_salt: str | None
    ends: list[int]
    checksums: str


class Stretch(NamedTuple):
    """One part of one layer in a file: of one state (`state` says which), or of all tokens (None). It consists of
    `num_rows` rows of `row_bytes` bytes, from byte `offset` of the file's data on."""

    layer: int
    part: int  # index among the layer's slot parts, or among its token parts
    state: int | None
    offset: int
    num_rows: int
    row_bytes: int

    def pieces(self) -> list[Piece]:
        """The stretch in pieces of at most PIECE_BYTES bytes, or of one row."""
        step = max(1, PIECE_BYTES // self.row_bytes)
        starts = range(0, self.num_rows, step)
        return [Piece(self, start, min(step, self.num_rows - start)) for start in starts]


class Piece(NamedTuple):
    """Consecutive rows of a stretch, which are moved at once and have a checksum."""

    stretch: Stretch
    start: int
    num_rows: int

    @property
    def offset(self) -> int:
        """From the beginning of the file's data, in bytes."""
        return self.stretch.offset + self.start * self.stretch.row_bytes

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.stretch.row_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """What sessions of this engine contain. `caches`: by layer; `dtypes`: of parts in a snapshot."""

    fingerprint: str
    caches: list[CacheSpec]
    dtypes: DTypes
    vocab_size: int
    max_model_len: int

    def parts(self) -> Iterator[tuple[int, int, Part, bool]]:
        """(layer, index of the part in it, part, whether it is a slot part), in the order of a file."""
        for i, cache in enumerate(self.caches):
            yield from ((i, j, part, True) for j, part in enumerate(cache.slot))
        for i, cache in enumerate(self.caches):
            yield from ((i, j, part, False) for j, part in enumerate(cache.token))

    def tensors(self, num_tokens: int, num_states: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor of a file, in its order."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for layer, _, part, is_slot in self.parts():
            count = num_states if is_slot else num_tokens
            found[_tensor_name(layer, part)] = (self.dtypes.of(part), (count, *part.shape))
        return found | {TOKENS: (torch.int32, (num_tokens,))}

    def is_state(self, name: str) -> bool:
        """Whether the tensor holds a recurrent state, whose dtype is the setting `snapshot_dtype`."""
        return any(part.holds == "state" and name == _tensor_name(layer, part) for layer, _, part, _ in self.parts())

    def pieces(self, num_tokens: int, num_states: int) -> list[Piece]:
        """All pieces of a file but the last, which are its tokens."""
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


@dataclass(frozen=True, slots=True)
class SessionHeader:
    """A file that fits this engine: its tokens [N] int32, and where its other tensors are."""

    path: Path
    tokens: np.ndarray
    ends: list[int]
    cache_salt: str | None
    stored: dict[str, StoredTensor]
    checksums: list[int]

    @property
    def start(self) -> int:
        """Bytes of the file before its data."""
        return min(tensor.offset for tensor in self.stored.values())

    @property
    def num_bytes(self) -> int:
        last = self.stored[TOKENS]
        return last.offset + last.nbytes


def checksum(data: np.ndarray) -> int:
    """Of bytes [N] uint8: CRC-32 of the sums (modulo 2^64) of every 512 words of 8 bytes, and of the bytes after them.
    Finds any one wrong byte, and a page in another's place, at the speed of memory."""
    whole = len(data) // (8 * WORDS) * 8 * WORDS
    sums = np.add.reduce(data[:whole].view(np.uint64).reshape(-1, WORDS), axis=1)
    return zlib.crc32(data[whole:].tobytes(), zlib.crc32(sums.tobytes()))


def make_header(layout: Layout, num_tokens: int, ends: list[int], salt: str | None, checksums: list[int]) -> bytes:
    """The file's bytes before its data. Their number does not depend on the checksums' values."""
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


def read_session(path: Path, layout: Layout) -> SessionHeader:
    """Look at everything but states, keys and values. Raises `SessionError` when the file is not there, not whole, or
    not for this engine."""
    _check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            fields = file.metadata() or {}
        stored = {tensor.name: tensor for tensor in read_header(path)}
    except (SafetensorError, OSError, CheckpointError) as error:
        raise damaged(f"it is not a readable safetensors file: {_without(path, error)}") from None
    metadata = _read_metadata(fields)
    if metadata.fingerprint != layout.fingerprint:
        raise SessionError(
            "the session is of another model, or of another checkpoint of it: its fingerprint begins with "
            f"{metadata.fingerprint[:16]!r}, this model's with {layout.fingerprint[:16]!r}; serve the model that wrote "
            "it",
            "session_mismatch",
        )
    _check_tensors(metadata, stored, layout)
    num_pieces = len(layout.pieces(stored[TOKENS].shape[0], len(metadata.ends))) + 1
    checksums = _read_checksums(metadata, num_pieces)
    tokens = _read_tokens(path, stored[TOKENS], checksums[-1])
    if tokens.min() < 0 or tokens.max() >= layout.vocab_size:
        raise damaged(f"its token ids are not in [0, {layout.vocab_size})")
    return SessionHeader(path, tokens, metadata.ends, metadata.cache_salt, stored, checksums)


def damaged(what: str) -> SessionError:
    return SessionError(
        f"the session's file is damaged: {what}; delete the session, and send its text", "session_damaged"
    )


def _check_regular(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise not_found() from None
    except OSError as error:
        raise SessionError(f"the session's file cannot be read: {error.strerror}", "session_failed") from None
    if not stat.S_ISREG(mode):
        raise damaged("it is a link or something else that is no file")


def _read_metadata(fields: dict[str, str]) -> Metadata:
    text = fields.get("session", "")
    if fields.get("format") != FORMAT:
        raise damaged(f"it is a safetensors file, but no {FORMAT}")
    if fields.get("sha256") != hashlib.sha256(text.encode()).hexdigest():
        raise damaged("its metadata do not match their sha256")
    try:
        version = msgspec.json.decode(text, type=dict[str, Any])["version"]
        if version != VERSION:
            raise SessionError(
                f"the session's file has format {version!r} and this server reads format {VERSION}; restore it with "
                "the version of Leyden that wrote it, or delete the session and send its text",
                "session_mismatch",
            )
        return msgspec.json.decode(text, type=Metadata)
    except (msgspec.MsgspecError, KeyError, RecursionError) as error:
        raise damaged(f"its metadata are malformed: {error}") from None


def _check_tensors(metadata: Metadata, stored: dict[str, StoredTensor], layout: Layout) -> None:
    shape = stored[TOKENS].shape if TOKENS in stored else ()
    if len(shape) != 1 or not shape[0]:
        raise damaged("it has no tokens")
    num_tokens, ends = shape[0], metadata.ends
    if num_tokens > layout.max_model_len:
        raise SessionError(
            f"the session has {num_tokens} tokens and the context holds {layout.max_model_len}; raise max_model_len",
            "session_mismatch",
        )
    are_increasing = all(a < b for a, b in zip([0, *ends], ends, strict=False))
    if not 0 < len(ends) <= MAX_STATES or not are_increasing or ends[-1] != num_tokens:
        raise damaged(f"its states cannot be after {ends[: MAX_STATES + 1]} of {num_tokens} tokens")
    expected = layout.tensors(num_tokens, len(ends))
    if stored.keys() != expected.keys():
        raise damaged(f"its tensors must be {_names(expected)}, not {_names(stored)}")
    for name, (dtype, wanted) in expected.items():
        if stored[name].shape != wanted:
            raise damaged(f"{name} has shape {list(stored[name].shape)}, not {list(wanted)}")
        if stored[name].dtype != dtype and name == TOKENS:
            raise damaged(f"its tokens are {_name(stored[name].dtype)}, not int32")
        if stored[name].dtype != dtype:
            setting = "snapshot_dtype" if layout.is_state(name) else "dtype"
            raise SessionError(
                f"{name} of the session is {_name(stored[name].dtype)}, this server's {_name(dtype)}; "
                f"set {setting} as it was when the session was saved",
                "session_mismatch",
            )


def _read_checksums(metadata: Metadata, num_pieces: int) -> list[int]:
    digits = metadata.checksums
    try:
        if len(digits) != 8 * num_pieces:
            raise ValueError
        return np.frombuffer(bytes.fromhex(digits), dtype=">u4").tolist()
    except ValueError:
        raise damaged(f"it must have {num_pieces} checksums of 8 digits") from None


def _read_tokens(path: Path, stored: StoredTensor, expected: int) -> np.ndarray:
    data = torch.empty(stored.nbytes, dtype=torch.uint8)
    read_piece(path, stored.offset, data, expected)
    return data.numpy().view(np.int32)


def read_piece(path: Path, offset: int, into: Tensor, expected: int) -> None:
    """Fill bytes [N] uint8 from the file. Raises `SessionError` when their checksum is not `expected`."""
    try:
        read(path, offset, into)
    except CheckpointError as error:
        raise damaged(_without(path, error)) from None
    if checksum(into.numpy()) != expected:
        raise damaged(f"a checksum is wrong between bytes {offset} and {offset + len(into)}")


def _without(path: Path, error: Exception) -> str:
    """The error's message without the path: a client must not learn where the server keeps its files."""
    return str(error).replace(str(path), "the file")


def _names(tensors: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(sorted(tensors)), 200, placeholder=" ...")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
