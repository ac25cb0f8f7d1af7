"""Fields of a config.json that several families read alike, and how fast the heads of lightning layers forget."""

from __future__ import annotations

import math

from ..errors import CheckpointError
from ..specs import LayerSpec, ModelSpec, NormSpec, RopeSpec, SoftmaxSpec, YarnSpec
from .fields import Fields

# Fields whose other values change the mathematics of any family, with the values that are served; () = absent only.
SERVED = {"hidden_act": ("silu", "swish"), "sliding_window": ()}


def read_model(
    fields: Fields, layers: list[LayerSpec], architecture: str, *, postnorm: bool, has_zero_centred_norms: bool = False
) -> ModelSpec:
    """The spec of a model with these layers. Raises `CheckpointError`."""
    fields.must_all_be(SERVED)
    if all(isinstance(layer.mixer, SoftmaxSpec) for layer in layers):
        raise CheckpointError("config.json: no linear layer; Leyden serves hybrid linear-attention models")
    return ModelSpec(
        architecture=architecture,
        vocab_size=fields.positive("vocab_size"),
        hidden_size=fields.positive("hidden_size"),
        layers=tuple(layers),
        norm=NormSpec(fields.above_zero("rms_norm_eps", 1e-5), has_zero_centred_norms),
        postnorm=postnorm,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        max_model_len=max([fields.positive("max_position_embeddings"), *_stretched_lens(layers)]),
        eos_token_ids=fields.token_ids("eos_token_id"),
        dtype=_dtype(fields),
    )


def read_head_dim(fields: Fields) -> int:
    """The field head_dim; by default the hidden size divided by the number of heads."""
    if fields.has("head_dim"):
        return fields.positive("head_dim")
    return fields.positive("hidden_size") // fields.positive("num_attention_heads")


def read_rope(
    fields: Fields, default_theta: float | None = None, *, default_partial: float = 1.0, serves_yarn: bool = False
) -> RopeSpec:
    """The rotation that rope_parameters say, or their older name rope_scaling, which wins where both are given.

    Refuses a scaled rope, unless it is yarn and `serves_yarn`.
    """
    name = "rope_scaling" if fields.has("rope_scaling") else "rope_parameters"
    rope = fields.section(name)
    kinds = {rope.text("rope_type"), rope.text("type")} - {None}
    is_yarn = serves_yarn and kinds == {"yarn"}
    if not is_yarn:
        if name == "rope_scaling" and kinds != {"default"}:
            fields.must_be(name, {"rope_type": "default"})
        rope.must_be("rope_type", "default")
    head_dim = read_head_dim(fields)
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", default_partial))
    dim = fields.positive("rotary_dim", int(head_dim * partial))
    if dim > head_dim or dim % 2:
        raise CheckpointError(f"config.json: rotary_dim must be even and at most head_dim ({head_dim}), got {dim}")
    theta = (rope if rope.has("rope_theta") else fields).above_zero("rope_theta", default_theta)
    return RopeSpec(dim, theta, _read_yarn(rope, fields.positive("max_position_embeddings")) if is_yarn else None)


def _read_yarn(rope: Fields, max_position_embeddings: int) -> YarnSpec:
    """With transformers' defaults."""
    rope.must_all_be({"mscale": (), "mscale_all_dim": ()})
    original_len = rope.positive("original_max_position_embeddings", max_position_embeddings)
    factor = rope.above_zero("factor", max_position_embeddings / original_len)
    return YarnSpec(
        factor,
        original_len,
        attention_factor=rope.above_zero("attention_factor", 0.1 * math.log(max(factor, 1.0)) + 1.0),
        beta_fast=rope.above_zero("beta_fast", 32.0),
        beta_slow=rope.above_zero("beta_slow", 1.0),
        is_rounded=rope.flag("truncate", True),
    )


def _stretched_lens(layers: list[LayerSpec]) -> set[int]:
    """Context lengths that the layers' ropes were stretched to. A config.json gives the original length beside them."""
    ropes = {layer.mixer.rope for layer in layers if isinstance(layer.mixer, SoftmaxSpec)}
    return {rope.yarn.max_len for rope in ropes if rope.yarn is not None}


def _dtype(fields: Fields) -> str | None:
    """The dtype of the weights; "auto" counts as absent."""
    name = fields.text("dtype") or fields.text("torch_dtype")
    return None if name == "auto" else name


def geometric_slopes(num_heads: int) -> list[float]:
    """2^{-8 (h+1) / H} for any H, as Hugging Face's MiniMax has them."""
    return [2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)]


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi (Press et al. 2022): geometric for a power of two, otherwise two interleaved geometric lists."""
    if num_heads & (num_heads - 1) == 0:
        return geometric_slopes(num_heads)
    lower = 1 << (num_heads.bit_length() - 1)
    return geometric_slopes(lower) + geometric_slopes(2 * lower)[0::2][: num_heads - lower]


def layer_factor(i: int, num_layers: int) -> float:
    """How much layer i of all L layers (not of the lightning ones alone) forgets: 1 - i/(L-1) + 1e-5."""
    return 1.0 - i / (num_layers - 1) + 1e-5 if num_layers > 1 else 1.0 + 1e-5
