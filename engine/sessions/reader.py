"""Reads a session's file. Files are untrusted: safetensors checks the header, and this module compares its content with
the model that would use it. No buffer is allocated for a size that the file claims before that size is checked.
"""

from __future__ import annotations

import hashlib
import os
import stat
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...models.errors import CheckpointError
from ...models.loading.header import StoredTensor, read_header
from ...models.loading.reader import read
from ..errors import SessionError
from .folder import not_found
from .format import FORMAT, MAX_STATES, TOKENS, VERSION, Layout, Metadata, checksum


@dataclass(frozen=True, slots=True)
class SessionHeader:
    """The checked header and tokens of a file that fits this engine."""

    path: Path
    tokens: np.ndarray  # [N] int32
    ends: list[int]  # numbers of tokens after which the file has states
    cache_salt: str | None
    stored: dict[str, StoredTensor]  # by name
    checksums: list[int]  # by piece; the last belongs to the tokens

    @property
    def start(self) -> int:
        """Bytes of the file before its data."""
        return min(tensor.offset for tensor in self.stored.values())

    @property
    def num_bytes(self) -> int:
        last = self.stored[TOKENS]
        return last.offset + last.nbytes


def read_session(path: Path, layout: Layout) -> SessionHeader:
    """Read and check a file except its states, keys and values. Raises `SessionError` if the file is missing, damaged,
    or of another model or other settings."""
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


def damaged(problem: str) -> SessionError:
    return SessionError(
        f"the session's file is damaged: {problem}; delete the session, and send its text", "session_damaged"
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
    """Fill bytes [N] uint8 from the file. Raises `SessionError` if their checksum is not `expected`."""
    try:
        read(path, offset, into)
    except CheckpointError as error:
        raise damaged(_without(path, error)) from None
    if checksum(into.numpy()) != expected:
        raise damaged(f"a checksum is wrong between bytes {offset} and {offset + len(into)}")


def _without(path: Path, error: Exception) -> str:
    """The error's message without the path. A client must not learn the server's folders."""
    return str(error).replace(str(path), "the file")


def _names(tensors: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(sorted(tensors)), 200, placeholder=" ...")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
