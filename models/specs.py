"""The normal form of a model: a `ModelSpec` describes each layer, in the same fields for every family.

A field of a spec that changes the mathematics is an option of the module that the spec builds. An option needs two
families that use it; a mixer that shares little with its neighbours gets a spec and a module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True)
class YarnSpec:
    """A rope stretched over a context `factor` times longer than the one of training (Peng et al. 2023).

    Pairs that turn `beta_fast` times or more within `original_len` positions keep their frequency. The frequency of
    pairs that turn `beta_slow` times or less is divided by `factor`. Between them lies a ramp.
    """

    factor: float
    original_len: int
    attention_factor: float  # of cosines and sines, so that scores grow by its square
    beta_fast: float
    beta_slow: float
    is_rounded: bool  # the ramp's ends, to whole pairs

    @property
    def max_len(self) -> int:
        """The context length, in tokens, that the rope reaches."""
        return int(self.factor * self.original_len)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """A rotation of the first `dim` channels of each head by the token's position, in pairs (j, j + dim/2)."""

    dim: int
    theta: float
    yarn: YarnSpec | None = None


@dataclass(frozen=True, slots=True)
class NormSpec:
    """An RMS norm: x / sqrt(mean(x^2) + eps) * w.

    `is_zero_centred`: checkpoints hold w - 1. The model adds 1 in float32 and keeps the sum so.
    """

    eps: float
    is_zero_centred: bool = False


@dataclass(frozen=True, slots=True)
class LightningSpec:
    """A lightning-attention mixer. `slopes` holds s > 0 per head, layer factor included; the decay is e^{-s}."""

    kind: ClassVar[str] = "lightning"

    num_heads: int
    head_dim: int
    slopes: tuple[float, ...]
    scale: float
    norm_eps: float  # of the RMS norm of all heads' outputs
    has_silu: bool = True  # of queries, keys and values
    is_interleaved: bool = True  # rows: q, k, v of each head in turn; otherwise all q, all k, all v
    norm_groups: int = 1  # equal parts of all heads' outputs, each with statistics of its own
    rope: RopeSpec | None = None  # of queries and keys
    qk_norm: NormSpec | None = None  # of each head's query and key before rope

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, K, V] of one sequence in one layer."""
        return (self.num_heads, self.head_dim, self.head_dim)


@dataclass(frozen=True, slots=True)
class GatedDeltaSpec:
    """A gated delta net: a convolution over the last 4 tokens, the delta rule with a decay, and a gated norm of each
    value head's output."""

    kind: ClassVar[str] = "gated_delta"

    num_key_heads: int
    num_value_heads: int  # a multiple of num_key_heads
    key_dim: int
    value_dim: int
    norm_eps: float
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    # A checkpoint holds in_proj_qkvz and in_proj_ba with the rows of each key head in turn; otherwise in_proj_qkv,
    # in_proj_z, in_proj_b and in_proj_a.
    is_grouped: bool = False


@dataclass(frozen=True, slots=True)
class SoftmaxSpec:
    """A softmax-attention mixer with grouped key/value heads."""

    kind: ClassVar[str] = "softmax"

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qk_norm: NormSpec | None = None  # of each head's query and key before rope
    is_fused: bool = False  # a checkpoint holds q, k and v as one tensor, all q first
    has_gate: bool = False  # of the output, by sigmoid; a checkpoint's q_proj holds the query and the gate of each head

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """A gated MLP of inner width `width`."""

    width: int


@dataclass(frozen=True, slots=True)
class SoftmaxRoute:
    """Softmax over all experts; the weights of the chosen ones are renormalised to a sum of 1."""

    has_float32_gate: bool = True  # the gate's matrix is kept in float32; otherwise in the model's dtype


@dataclass(frozen=True, slots=True)
class SigmoidGroupRoute:
    """The largest of sigmoid + bias in the `num_kept` best of `num_groups` groups of experts. Their sigmoids without
    the bias, renormalised and times `scale`, are the weights. A checkpoint holds the bias."""

    num_groups: int
    num_kept: int
    scale: float


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of `num_experts` gated MLPs of inner width `width`; each token takes `top_k` of them, by `route`."""

    width: int
    num_experts: int
    top_k: int
    route: SoftmaxRoute | SigmoidGroupRoute


@dataclass(frozen=True, slots=True)
class SharedSpec:
    """A gated MLP of inner width `width` beside a layer's MLP or experts, for all tokens.

    `joining`, with c = sigmoid(coefficient x): "added", mlp(x) + shared(x); "mixed", (1 - c) * mlp(x) + c * shared(x);
    "gated", mlp(x) + c * shared(x).
    """

    width: int
    joining: Literal["added", "mixed", "gated"]


@dataclass(frozen=True, slots=True)
class Residual:
    """h = alpha * residual + beta * f(x)."""

    alpha: float
    beta: float


MixerSpec = LightningSpec | GatedDeltaSpec | SoftmaxSpec


@dataclass(frozen=True, slots=True)
class LayerSpec:
    mixer: MixerSpec
    mlp: DenseSpec | ExpertsSpec
    mixer_residual: Residual
    mlp_residual: Residual
    shared: SharedSpec | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything needed to build and run a model. `postnorm`: the residual is the norm's output, not its input."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec  # before each mixer, before each MLP, and the last one
    postnorm: bool
    tie_word_embeddings: bool
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str | None  # of the checkpoint, as config.json names it

    @property
    def layer_counts(self) -> dict[str, int]:
        """The number of layers of each kind of mixer, in the order of first appearance."""
        kinds = [layer.mixer.kind for layer in self.layers]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
