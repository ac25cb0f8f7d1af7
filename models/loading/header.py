"""The tensors of a safetensors file, by its header alone."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .checkpoint import refuse_pointer

MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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

    @property
    def is_quantised(self) -> bool:
        """Whether its items are no weights themselves."""
        return not self.dtype.is_floating_point or self.dtype.itemsize < 2

    def rows(self, start: int, count: int) -> StoredTensor:
        """`count` rows of the first dim from `start`: bytes in one piece."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(count, *self.shape[1:]), offset=self.offset + start * row)

    def reshaped(self, *shape: int) -> StoredTensor:
        """The same items in another shape."""
        assert math.prod(shape) == math.prod(self.shape)
        return replace(self, shape=shape)

    def row(self, i: int) -> StoredTensor:
        """One row of the first dim, without that dim."""
        return replace(self.rows(i, 1), shape=self.shape[1:])


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
                f"{path}: tensor {name!r} is {code}, of which no kind of weights is read; take a checkpoint in "
                "float32, bfloat16 or float16, or in a quantised format of docs/quantization.md"
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
