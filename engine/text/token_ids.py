"""Token ids of a prompt: one array, however many there are."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from ..errors import RequestError


class TokenIds(Sequence[int]):
    """Ids [N] int32, never changed. Four bytes each, made once, and sent between processes as they lie in memory.

    Compares equal to a list of the same ids; a slice is a list. Raises `RequestError` for an id beyond int32.
    """

    __slots__ = ("numpy",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, ids: TokenIds | Iterable[int] | bytes) -> None:
        self.numpy: np.ndarray
        if isinstance(ids, TokenIds):
            self.numpy = ids.numpy
            return
        try:
            packed = ids if isinstance(ids, bytes) else array("i", ids)
        except OverflowError:
            raise RequestError("prompt holds a token id that no vocabulary has", "prompt") from None
        self.numpy = np.frombuffer(packed, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.numpy)

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        found: int | list[int] = self.numpy[at].tolist()
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenIds | list | tuple):
            return NotImplemented
        return bool(np.array_equal(self.numpy, other.numpy if isinstance(other, TokenIds) else np.array(other)))

    def __repr__(self) -> str:
        return f"TokenIds({self[:8]}{'...' if len(self) > 8 else ''})"

    def tolist(self) -> list[int]:
        ids: list[int] = self.numpy.tolist()
        return ids

    def first_outside(self, vocab_size: int) -> int | None:
        """The first id that is not in [0, vocab_size)."""
        if not len(self) or (self.numpy.min() >= 0 and self.numpy.max() < vocab_size):
            return None
        is_outside = (self.numpy < 0) | (self.numpy >= vocab_size)
        return int(self.numpy[is_outside.argmax()])


def encode_token_ids(value: Any) -> bytes:
    """msgspec's `enc_hook`: encodes `TokenIds`."""
    if isinstance(value, TokenIds):
        return value.numpy.tobytes()
    raise NotImplementedError(f"cannot encode a {type(value).__name__}")


def decode_token_ids(kind: type, value: Any) -> TokenIds:
    """msgspec's `dec_hook`: decodes `TokenIds`."""
    if kind is TokenIds:
        return TokenIds(value)
    raise NotImplementedError(f"cannot decode a {kind.__name__}")
