"""The object that a checkpoint describes its quantisation with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..checkpoint import read_json

MODELOPT_FILE = "hf_quant_config.json"
NAMES = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class QuantizationConfig:
    """Typed reading; every method raises a `CheckpointError` that names the file and the field."""

    file: str
    fields: Mapping[str, Any]

    @property
    def method(self) -> str:
        return self.text("quant_method")

    def get(self, name: str, default: Any = None) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.file}: {name} must be a string, got {value!r}")
        return value

    def integer(self, name: str) -> int:
        value = self.get(name)
        if type(value) is not int:
            raise CheckpointError(f"{self.file}: {name} must be an integer, got {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.file}: {name} must be true or false, got {value!r}")
        return value

    def texts(self, *names: str) -> tuple[str, ...]:
        """The entries of those lists that are present, one after another."""
        found: list[str] = []
        for name in names:
            value = self.get(name, [])
            if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
                raise CheckpointError(f"{self.file}: {name} must be a list of strings, got {value!r}")
            found += value
        return tuple(found)

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuse a value that is not served; absent is fine."""
        value = self.fields.get(name)
        if value is not None and value not in allowed:
            options = ", ".join(map(repr, allowed))
            raise CheckpointError(f"{self.file}: {name} = {value!r} is not supported (supported: {options})")


def read_quantization_config(folder: Path) -> QuantizationConfig | None:
    """From config.json, beside the text model's fields or among them, or from hf_quant_config.json. None: the
    checkpoint has no such object. Raises `CheckpointError`."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for name in NAMES:
            if holder.get(name) is not None:
                return _checked("config.json", name, holder[name])
    if (folder / MODELOPT_FILE).exists():
        found = _checked(MODELOPT_FILE, "quantization", read_json(folder / MODELOPT_FILE).get("quantization"))
        return QuantizationConfig(MODELOPT_FILE, {"quant_method": "modelopt", **found.fields})
    return None


def _checked(file: str, name: str, value: Any) -> QuantizationConfig:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{file}: {name} must be an object, got {value!r}")
    return QuantizationConfig(file, value)
