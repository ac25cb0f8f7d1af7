"""Typed reading of a config.json, for the families' `read` functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError


class Fields:
    """Typed reading of a config.json.

    Every method raises a `CheckpointError` that names the field when it is missing without a default, or has a wrong
    type or value. A field that is null counts as missing.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def has(self, name: str) -> bool:
        return self._config.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the field is present and null."""
        return name in self._config and self._config[name] is None

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"config.json: {name} must be a non-negative integer, got {value!r}")
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        value = self.integer(name, default)
        if value == 0:
            raise CheckpointError(f"config.json: {name} must be positive, got 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"config.json: {name} must be a number, got {value!r}")
        return float(value)

    def above_zero(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if value <= 0:
            raise CheckpointError(f"config.json: {name} must be positive, got {value}")
        return value

    def divisor(self, name: str, of: int, what: str) -> int:
        """A positive integer that divides `of`; `what` tells its origin in the message."""
        value = self.positive(name)
        if of % value:
            raise CheckpointError(f"config.json: {name} ({value}) must divide {what} ({of})")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} must be true or false, got {value!r}")
        return value

    def text(self, name: str) -> str | None:
        value = self._config.get(name)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"config.json: {name} must be a string, got {value!r}")
        return value

    def section(self, name: str) -> Fields:
        """The fields of a nested object; empty when it is absent."""
        value = self._config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {name} must be an object, got {value!r}")
        return Fields(value or {})

    def present(self) -> dict[str, Any]:
        """All fields that are not null."""
        return {name: value for name, value in self._config.items() if value is not None}

    def token_ids(self, name: str) -> tuple[int, ...]:
        """An integer, a list of them, or null."""
        return token_ids(self._config.get(name))

    def integers(self, name: str, length: int, default: int) -> list[int]:
        """One non-negative integer per layer; a single number stands for the same in every layer."""
        value = self._get(name, default)
        entries = value if isinstance(value, list) else [value] * length
        if len(entries) != length:
            raise CheckpointError(f"config.json: {name} has {len(entries)} entries for {length} layers")
        return [Fields({name: entry}).integer(name) for entry in entries]

    def kinds(self, name: str, length: int, *allowed: Any) -> list[Any]:
        """One of the values `allowed` per layer."""
        value = self._config.get(name)
        if not isinstance(value, list) or len(value) != length:
            raise CheckpointError(f"config.json: {name} must list {length} layers, got {value!r}")
        for kind in value:
            if kind not in allowed:
                raise CheckpointError(f"config.json: {name} may hold {' and '.join(map(repr, allowed))}, got {kind!r}")
        return value

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuse a value that would change the mathematics and is not implemented; absent or null is fine."""
        value = self._config.get(name)
        if value is not None and value not in allowed:
            options = ", ".join(repr(option) for option in allowed) or "absent"
            raise CheckpointError(f"config.json: {name} = {value!r} is not supported (supported: {options})")

    def must_all_be(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """`must_be` for each of these fields."""
        for name, values in allowed.items():
            self.must_be(name, *values)

    def must_be_same(self, name: str, other: str) -> None:
        """Refuse two names of one field that contradict each other."""
        a, b = self._config.get(name), self._config.get(other)
        if a != b:
            raise CheckpointError(f"config.json: {name} = {a!r} contradicts {other} = {b!r}; keep one of them")

    def _get(self, name: str, default: Any) -> Any:
        value = self._config.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"config.json: {name} is missing")
        return default


def token_ids(value: Any, file: str = "config.json") -> tuple[int, ...]:
    """An eos_token_id, which is an int, a list or null, as a tuple. Raises `CheckpointError`, which names `file`."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise CheckpointError(f"{file}: eos_token_id must be an integer or a list of them, got {value!r}")
    return tuple(dict.fromkeys(values))
