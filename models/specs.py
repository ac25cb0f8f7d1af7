"""The normal form of a model: whatever a config.json calls its fields, a `ModelSpec` says it once per layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class LightningSpec:
    """A lightning-attention mixer. `slopes` holds s > 0 per head, layer factor included; the decay is e^{-s}."""

    kind: ClassVar[str] = "lightning"

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

    kind: ClassVar[str] = "softmax"

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
