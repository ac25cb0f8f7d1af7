"""The file of a saved session: a safetensors file whose metadata says of which model it is and what its bytes sum to.

    states   [n, L_linear, H, K, V]     after the first `ends[i]` tokens, the last after all of them
    keys     [L_full, N, H_kv, D]
    values   [L_full, N, H_kv, D]
    tokens   [N] int32

The data are cut into pieces, each with a checksum. The header is written last, so that an unfinished file has none.
Files are untrusted: the library judges the header, everything in it is compared with the model that would take it, and
nothing is as large as the file says before it is known to fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...models.errors import CheckpointError
from ...models.loading.reader import DTYPES, StoredTensor, read, read_header
from ..errors import SessionError
from .folder import not_found

FORMAT = "leyden.session"
VERSION = 1
MAX_STATES = 2  # the end of the answer, and the one before: its prompt's, when no answer went between
PIECE_BYTES = 8 << 20  # at most, and part of the format: it says where checksums begin
WORDS = 512  # of 8 bytes, that are summed before they come into the checksum
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Facts(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The metadata. `checksums`: 8 hexadecimal digits per piece."""

    version: int
    fingerprint: str
    cache_salt: str | None
    ends: list[int]
    checksums: str


@dataclass(frozen=True, slots=True)
class Layout:
    """What this engine's sessions look like. `state_shape`: [L_linear, H, K, V], `kv_shape`: [L_full, H_kv, D]."""

    fingerprint: str
    state_shape: tuple[int, ...]
    state_dtype: torch.dtype
    kv_shape: tuple[int, int, int]
    kv_dtype: torch.dtype
    vocab_size: int
    max_model_len: int

    def tensors(self, num_tokens: int, num_states: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor of a file, in its order: what is aligned to more comes first."""
        layers, heads, dim = self.kv_shape
        kv = (self.kv_dtype, (layers, num_tokens, heads, dim))
        states = (self.state_dtype, (num_states, *self.state_shape))
        return {"states": states, "keys": kv, "values": kv, "tokens": (torch.int32, (num_tokens,))}


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
    def num_bytes(self) -> int:
        last = self.stored["tokens"]
        return last.offset + last.nbytes


def checksum(data: np.ndarray) -> int:
    """Of bytes [N] uint8: CRC-32 of the sums (modulo 2^64) of every 512 words of 8 bytes, and of the bytes after them.
    Finds any one wrong byte, and a page in another's place, at the speed of memory."""
    whole = len(data) // (8 * WORDS) * 8 * WORDS
    sums = np.add.reduce(data[:whole].view(np.uint64).reshape(-1, WORDS), axis=1)
    return zlib.crc32(data[whole:].tobytes(), zlib.crc32(sums.tobytes()))


def num_pieces(num_rows: int, row_bytes: int) -> int:
    """Pieces of a tensor's part that is `num_rows` rows."""
    return -(-num_rows // rows_per_piece(row_bytes)) if num_rows and row_bytes else 0


def rows_per_piece(row_bytes: int) -> int:
    return max(1, PIECE_BYTES // row_bytes)


def make_header(layout: Layout, num_tokens: int, ends: list[int], salt: str | None, checksums: list[int]) -> bytes:
    """The file's bytes before its data. Their number does not depend on the checksums' values."""
    facts = Facts(
        version=VERSION,
        fingerprint=layout.fingerprint,
        cache_salt=salt,
        ends=ends,
        checksums="".join(f"{value:08x}" for value in checksums),
    )
    text = msgspec.json.encode(facts).decode()
    metadata = {"format": FORMAT, "session": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    fields: dict[str, Any] = {"__metadata__": metadata}
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
            metadata = file.metadata() or {}
        stored = {tensor.name: tensor for tensor in read_header(path)}
    except (SafetensorError, OSError, CheckpointError) as error:
        raise damaged(f"it is not a readable safetensors file: {_without(path, error)}") from None
    facts = _read_facts(metadata)
    if facts.fingerprint != layout.fingerprint:
        raise SessionError(
            "the session is of another model, or of another checkpoint of it: its fingerprint begins with "
            f"{facts.fingerprint[:16]!r}, this model's with {layout.fingerprint[:16]!r}; serve the model that wrote it",
            "session_mismatch",
        )
    _check_tensors(facts, stored, layout)
    checksums = _read_checksums(facts, stored)
    tokens = _read_tokens(path, stored["tokens"], checksums[-1])
    if tokens.min() < 0 or tokens.max() >= layout.vocab_size:
        raise damaged(f"its token ids are not in [0, {layout.vocab_size})")
    return SessionHeader(path, tokens, facts.ends, facts.cache_salt, stored, checksums)


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


def _read_facts(metadata: dict[str, str]) -> Facts:
    text = metadata.get("session", "")
    if metadata.get("format") != FORMAT:
        raise damaged(f"it is a safetensors file, but no {FORMAT}")
    if metadata.get("sha256") != hashlib.sha256(text.encode()).hexdigest():
        raise damaged("its metadata do not match their sha256")
    try:
        version = msgspec.json.decode(text, type=dict[str, Any])["version"]
        if version != VERSION:
            raise SessionError(f"the session has format version {version!r}, not {VERSION}", "session_mismatch")
        return msgspec.json.decode(text, type=Facts)
    except (msgspec.MsgspecError, KeyError, RecursionError) as error:
        raise damaged(f"its metadata are malformed: {error}") from None


def _check_tensors(facts: Facts, stored: dict[str, StoredTensor], layout: Layout) -> None:
    shape = stored["tokens"].shape if "tokens" in stored else ()
    if len(shape) != 1 or not shape[0]:
        raise damaged("it has no tokens")
    num_tokens, ends = shape[0], facts.ends
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
        raise damaged(f"its tensors must be {', '.join(expected)}, not {', '.join(sorted(stored))[:200]}")
    for name, (dtype, wanted) in expected.items():
        if stored[name].shape != wanted:
            raise damaged(f"{name} has shape {list(stored[name].shape)}, not {list(wanted)}")
        if stored[name].dtype != dtype and name == "tokens":
            raise damaged(f"its tokens are {_name(stored[name].dtype)}, not int32")
        if stored[name].dtype != dtype:
            setting = "snapshot_dtype" if name == "states" else "dtype"
            raise SessionError(
                f"{name} of the session are {_name(stored[name].dtype)}, this server's {_name(dtype)}; "
                f"set {setting} as it was when the session was saved",
                "session_mismatch",
            )


def _read_checksums(facts: Facts, stored: dict[str, StoredTensor]) -> list[int]:
    num_layers, num_tokens, heads, dim = stored["keys"].shape
    kv_row = heads * dim * stored["keys"].dtype.itemsize
    rows, row_bytes = state_rows(stored["states"].shape, stored["states"].dtype)
    expected = stored["states"].shape[0] * num_pieces(rows, row_bytes)
    expected += 2 * num_layers * num_pieces(num_tokens, kv_row) + 1
    digits = facts.checksums
    try:
        if len(digits) != 8 * expected:
            raise ValueError
        return np.frombuffer(bytes.fromhex(digits), dtype=">u4").tolist()
    except ValueError:
        raise damaged(f"it must have {expected} checksums of 8 digits") from None


def state_rows(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """(rows, bytes of each) of one state of a tensor [n, L, H, K, V]: a row is what a head has in a layer."""
    return math.prod(shape[1:3]), math.prod(shape[3:]) * dtype.itemsize


def _read_tokens(path: Path, stored: StoredTensor, expected: int) -> np.ndarray:
    data = torch.empty(stored.nbytes, dtype=torch.uint8)
    read_piece(path, stored.offset, data, expected)
    return data.numpy().view(np.int32)


def read_piece(path: Path, offset: int, into: Tensor, expected: int) -> None:
    """Fill bytes [N] uint8 from the file. Raises `SessionError` when they are not those that were written."""
    try:
        read(path, offset, into)
    except CheckpointError as error:
        raise damaged(_without(path, error)) from None
    if checksum(into.numpy()) != expected:
        raise damaged(f"a checksum is wrong between bytes {offset} and {offset + len(into)}")


def _without(path: Path, error: Exception) -> str:
    """The message; where the server's files lie is nobody's business."""
    return str(error).replace(str(path), "the file")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
