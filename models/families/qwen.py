"""Shared by Qwen3-Next and Qwen3.5: groups of gated delta nets that each end in gated softmax attention.

"Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang et al. 2024).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..loading.names import LeftOut, Names, Released, Rename
from ..specs import (
    DenseSpec,
    ExpertsSpec,
    GatedDeltaSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
    Residual,
    SharedSpec,
    SoftmaxRoute,
    SoftmaxSpec,
)
from .common import read_model, read_rope
from .fields import Fields

PLAIN = Residual(1.0, 1.0)
LINEAR, FULL = "linear_attention", "full_attention"
# Fields whose other values would change the mathematics, and the values that are served.
SERVED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "layer_scale": (False,),
    "linear_conv_kernel_dim": (4,),
    "mamba_ssm_dtype": ("float32",),
    "norm_topk_prob": (True,),
    "output_gate_type": ("silu", "swish", "sigmoid"),
    "use_sliding_window": (False,),
}

# Defaults of fields that a config.json leaves out, as the reference codes have them.
DEFAULT_INTERVAL = 4
DEFAULT_PARTIAL = 0.25

# Parts of tensors' names, in files and here.
SPELLINGS = {".mlp.shared_expert.": ".shared_mlp.", ".mlp.shared_expert_gate.": ".coefficient."}
PARTS_LEFT_OUT = (
    LeftOut(re.compile(r"^visual\."), "the vision encoder"),
    LeftOut(re.compile(r"^mtp\."), "the layers that predict several tokens"),
)


class Mlp(NamedTuple):
    """What follows the mixer of one layer."""

    mlp: DenseSpec | ExpertsSpec
    shared: SharedSpec | None = None


def read_qwen(fields: Fields, mlps: list[Mlp], architecture: str, *, is_grouped: bool) -> ModelSpec:
    """The spec of a model with these MLPs, one per layer. `is_grouped`: of `GatedDeltaSpec`. Raises
    `CheckpointError`."""
    fields.must_all_be(SERVED)
    mixers: dict[str, GatedDeltaSpec | SoftmaxSpec] = {LINEAR: _delta(fields, is_grouped), FULL: _softmax(fields)}
    layers = [
        LayerSpec(mixer=mixers[kind], mlp=mlp, shared=shared, mixer_residual=PLAIN, mlp_residual=PLAIN)
        for kind, (mlp, shared) in zip(_kinds(fields), mlps, strict=True)
    ]
    return read_model(fields, layers, architecture, postnorm=False, has_zero_centred_norms=True)


def read_dense(fields: Fields) -> Mlp:
    return Mlp(DenseSpec(fields.positive("intermediate_size")))


def read_experts(fields: Fields) -> Mlp:
    """Experts, and one more that all tokens share. Raises `CheckpointError`."""
    num_experts, top_k = fields.positive("num_experts"), fields.positive("num_experts_per_tok")
    if top_k > num_experts:
        raise CheckpointError(f"config.json: num_experts_per_tok ({top_k}) exceeds num_experts ({num_experts})")
    shared = fields.integer("shared_expert_intermediate_size")
    return Mlp(
        ExpertsSpec(fields.positive("moe_intermediate_size"), num_experts, top_k, SoftmaxRoute(has_float32_gate=False)),
        SharedSpec(shared, "gated") if shared else None,
    )


def _kinds(fields: Fields) -> list[str]:
    """`LINEAR` or `FULL` for each layer: layer_types, or every full_attention_interval-th layer full."""
    num_layers = fields.positive("num_hidden_layers")
    if fields.has("layer_types"):
        return fields.kinds("layer_types", num_layers, LINEAR, FULL)
    interval = fields.positive("full_attention_interval", DEFAULT_INTERVAL)
    return [LINEAR if (i + 1) % interval else FULL for i in range(num_layers)]


def _delta(fields: Fields, is_grouped: bool) -> GatedDeltaSpec:
    num_value_heads = fields.positive("linear_num_value_heads")
    return GatedDeltaSpec(
        num_key_heads=fields.divisor("linear_num_key_heads", num_value_heads, "linear_num_value_heads"),
        num_value_heads=num_value_heads,
        key_dim=fields.positive("linear_key_head_dim"),
        value_dim=fields.positive("linear_value_head_dim"),
        norm_eps=fields.above_zero("rms_norm_eps"),
        gate_activation="sigmoid" if fields.text("output_gate_type") == "sigmoid" else "silu",
        is_grouped=is_grouped,
    )


def _softmax(fields: Fields) -> SoftmaxSpec:
    num_heads = fields.positive("num_attention_heads")
    return SoftmaxSpec(
        num_heads=num_heads,
        num_kv_heads=fields.divisor("num_key_value_heads", num_heads, "num_attention_heads"),
        head_dim=fields.positive("head_dim"),
        rope=read_rope(fields, default_partial=DEFAULT_PARTIAL, serves_yarn=True),
        qk_norm=NormSpec(fields.above_zero("rms_norm_eps"), is_zero_centred=True),
        has_gate=fields.flag("attn_output_gate", True),
    )


def names(spec: ModelSpec) -> Names:
    """The spellings of this model's checkpoints, inside a vision model and alone."""
    delta = "|".join(str(i) for i, layer in enumerate(spec.layers) if isinstance(layer.mixer, GatedDeltaSpec))
    text = re.compile(r"^(?=layers\.|embed_tokens\.|norm\.)")
    inside = Released(text, "model.language_model.", re.compile(r"^(model\.)?(layers|embed_tokens|norm)\."))
    is_inside = spec.architecture.endswith("ForConditionalGeneration")
    return Names(
        renames=(
            Rename(re.compile(r"^model\.(language_model\.)?"), ""),
            Rename(re.compile(r"\.linear_attn\."), ".self_attn."),
            *(Rename(re.compile(re.escape(stored)), canonical) for stored, canonical in SPELLINGS.items()),
        ),
        released=(
            Released.back(rf"^(layers\.(?:{delta}))\.self_attn\.", r"\1.linear_attn."),
            *(Released.back(re.escape(canonical), stored) for stored, canonical in SPELLINGS.items()),
            *((inside,) if is_inside else ()),
            Released(text, "model.", text),
        ),
        left_out=PARTS_LEFT_OUT,
    )
