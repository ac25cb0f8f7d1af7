"""The normal form of a model: whatever a config.json calls its fields, a `ModelSpec` says it once per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError


@dataclass(frozen=True, slots=True)
class LightningSpec:
    """A lightning-attention mixer. `slopes` holds s > 0 per head, layer factor included; the decay is e^{-s}."""

    num_heads: int
    head_dim: int
    slopes: tuple[float, ...]
    scale: float
    norm_eps: float  # of the RMS norm over all heads' outputs

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, K, V] of one sequence in one layer."""
        return (self.num_heads, self.head_dim, self.head_dim)


@dataclass(frozen=True, slots=True)
class SoftmaxSpec:
    """A softmax-attention mixer with grouped key/value heads and rope on the first `rotary_dim` channels."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """A gated MLP: dense when `num_experts` is 1, otherwise `top_k` of `num_experts` chosen by softmax.

    `router` tells whether a checkpoint stores router and expert tensors even for one expert. A shared expert of width
    `shared_width` > 0 is mixed in by a learned sigmoid coefficient.
    """

    width: int
    num_experts: int
    top_k: int
    router: bool
    shared_width: int = 0


@dataclass(frozen=True, slots=True)
class Residual:
    """h = alpha * residual + beta * f(x)."""

    alpha: float
    beta: float


@dataclass(frozen=True, slots=True)
class LayerSpec:
    mixer: LightningSpec | SoftmaxSpec
    mlp: MlpSpec
    mixer_residual: Residual
    mlp_residual: Residual


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything needed to build and run a model. `postnorm`: the residual is the normed tensor, not its input."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    rms_norm_eps: float
    postnorm: bool
    tie_word_embeddings: bool
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str | None  # of the checkpoint, as config.json names it

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Normalise a config.json. Raises `CheckpointError` for an unknown architecture or a field it cannot honour."""
        from .families.registry import FAMILIES, find_architecture

        architecture = find_architecture(config)
        return FAMILIES[architecture](config, architecture)

    @property
    def linear_layers(self) -> list[LightningSpec]:
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, LightningSpec)]

    @property
    def full_layers(self) -> list[SoftmaxSpec]:
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, SoftmaxSpec)]

    def state_bytes_per_sequence(self, itemsize: int) -> int:
        """Bytes of recurrent state that one sequence holds, whatever its length."""
        return sum(math.prod(spec.state_shape) for spec in self.linear_layers) * itemsize

    def ring_bytes_per_sequence(self, ring_size: int, itemsize: int) -> int:
        """Bytes of the `ring_size` keys and values that wait beside each state."""
        shapes = [spec.state_shape for spec in self.linear_layers]
        return sum(heads * ring_size * (K + V) for heads, K, V in shapes) * itemsize

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token adds."""
        return sum(2 * spec.num_kv_heads * spec.head_dim for spec in self.full_layers) * itemsize


class Fields:
    """Typed reading of a config.json: a missing or wrongly typed field is an error that names it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def has(self, name: str) -> bool:
        return self._config.get(name) is not None

    def is_null(self, name: str) -> bool:
        """The field is there, and null."""
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

    def flag(self, name: str, default: bool) -> bool:
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

    def integers(self, name: str, length: int, default: int) -> list[int]:
        """One non-negative integer per layer; a single number stands for the same in every layer."""
        value = self._get(name, default)
        entries = value if isinstance(value, list) else [value] * length
        if len(entries) != length:
            raise CheckpointError(f"config.json: {name} has {len(entries)} entries for {length} layers")
        return [Fields({name: entry}).integer(name) for entry in entries]

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuse a value that would change the mathematics and is not implemented; absent or null is fine."""
        value = self._config.get(name)
        if value is not None and value not in allowed:
            options = ", ".join(repr(option) for option in allowed) or "absent"
            raise CheckpointError(f"config.json: {name} = {value!r} is not supported (supported: {options})")

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
    """eos_token_id is an int, a list or null. Raises `CheckpointError`, which names `file`."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise CheckpointError(f"{file}: eos_token_id must be an integer or a list of them, got {value!r}")
    return tuple(dict.fromkeys(values))
