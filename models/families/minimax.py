"""MiniMax-Text-01 and M1, in both spellings of config.json: lightning attention in most layers, experts after each.

The original (`MiniMaxText01ForCausalLM`, `MiniMaxM1ForCausalLM`) has the fields attn_type_list and layernorm_*_alpha;
Hugging Face's own class (`MiniMaxForCausalLM`) has layer_types and *_alpha_factor. Three things differ besides: the
slopes of a number of heads that is no power of two, a 1e-5 in the layer factor, and whether `postnorm` is a choice.
"MiniMax-01: Scaling Foundation Models with Lightning Attention" (2025).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..loading.names import Names, Released, Rename
from ..specs import (
    DenseSpec,
    ExpertsSpec,
    LayerSpec,
    LightningSpec,
    ModelSpec,
    Residual,
    SharedSpec,
    SoftmaxRoute,
    SoftmaxSpec,
)
from .common import alibi_slopes, geometric_slopes, layer_factor, read_head_dim, read_model, read_rope
from .fields import Fields

# Hugging Face's models in memory have the canonical names. Released checkpoints have others.
NAMES = Names(
    renames=(
        Rename(re.compile(r"^model\."), ""),
        Rename(re.compile(r"\.block_sparse_moe\."), ".mlp."),
        Rename(re.compile(r"(\.experts\.\d+)\.w1\."), r"\1.gate_proj."),
        Rename(re.compile(r"(\.experts\.\d+)\.w3\."), r"\1.up_proj."),
        Rename(re.compile(r"(\.experts\.\d+)\.w2\."), r"\1.down_proj."),
    ),
    released=(
        Released(re.compile(r"(\.experts\.\d+)\.gate_proj\."), r"\1.w1.", re.compile(r"\.experts\.\d+\.gate_proj\.")),
        Released(re.compile(r"(\.experts\.\d+)\.up_proj\."), r"\1.w3.", re.compile(r"\.experts\.\d+\.up_proj\.")),
        Released(re.compile(r"(\.experts\.\d+)\.down_proj\."), r"\1.w2.", re.compile(r"\.experts\.\d+\.down_proj\.")),
        Released(
            re.compile(r"\.mlp\.(experts|gate)\."), r".block_sparse_moe.\1.", re.compile(r"\.mlp\.(experts|gate)\.")
        ),
        Released(re.compile(r"^(?!lm_head\.)"), "model.", re.compile(r"^(?!model\.|lm_head\.)")),
    ),
    # Buffers that Hugging Face's class used to save, and that follow from the config.
    ignored=re.compile(r"(^|\.)(slope_rate|query_decay|key_decay|diagonal_decay|rotary_emb\.inv_freq)$"),
)


# Defaults of fields that a config.json leaves out, as both reference codes have them.
DEFAULT_KV_HEADS = 8
DEFAULT_EXPERTS = 8
DEFAULT_TOP_K = 2
DEFAULT_ROPE_THETA = 1e6
DEFAULT_EOS = 2  # in Hugging Face's class alone

# Both reference codes build the norm over all heads' outputs without an eps. So its eps is the class default, for any
# rms_norm_eps.
INNER_NORM_EPS = 1e-6


def names(spec: ModelSpec) -> Names:
    """The spellings of MiniMax checkpoints; the same for every model."""
    return NAMES


def read_hf(config: Mapping[str, Any], architecture: str) -> ModelSpec:
    """`MiniMaxForCausalLM`. Raises `CheckpointError`."""
    fields = Fields({"eos_token_id": DEFAULT_EOS} | dict(config))
    num_layers = fields.positive("num_hidden_layers")
    kinds = ["linear_attention" if i % 2 else "full_attention" for i in range(num_layers)]
    if config.get("layer_types"):
        kinds = fields.kinds("layer_types", num_layers, "linear_attention", "full_attention")
    layers = []
    for i, kind in enumerate(kinds):
        slopes = tuple(
            b * hf_layer_factor(i, num_layers) for b in geometric_slopes(fields.positive("num_attention_heads"))
        )
        prefix = "linear_attn" if kind == "linear_attention" else "full_attn"
        layers.append(
            LayerSpec(
                mixer=_lightning(fields, slopes) if kind == "linear_attention" else _softmax(fields),
                mlp=_experts(fields, fields.positive(_experts_field(fields), DEFAULT_EXPERTS)),
                mixer_residual=_residual(fields, f"{prefix}_alpha_factor", f"{prefix}_beta_factor"),
                mlp_residual=_residual(fields, "mlp_alpha_factor", "mlp_beta_factor"),
            )
        )
    return read_model(fields, layers, architecture, postnorm=True)


def read_original(config: Mapping[str, Any], architecture: str) -> ModelSpec:
    """`MiniMaxText01ForCausalLM` and `MiniMaxM1ForCausalLM`. Raises `CheckpointError`."""
    fields = Fields(config)
    num_layers = fields.positive("num_hidden_layers")
    name = "attn_type_list" if fields.has("attn_type_list") else "decoder_attention_types"
    if not fields.has(name):
        raise CheckpointError("config.json: attn_type_list is missing (0 = lightning, 1 = softmax, one per layer)")
    kinds = fields.kinds(name, num_layers, 0, 1)
    num_experts = fields.integers(_experts_field(fields), num_layers, DEFAULT_EXPERTS)
    shared = fields.integers("shared_intermediate_size", num_layers, 0)
    fields.must_be("shared_moe_mode", "sigmoid", *(("softmax",) if not any(shared) else ()))
    layers = []
    for i, kind in enumerate(kinds):
        slopes = tuple(b * layer_factor(i, num_layers) for b in alibi_slopes(fields.positive("num_attention_heads")))
        prefix = "layernorm_linear_attention" if kind == 0 else "layernorm_full_attention"
        layers.append(
            LayerSpec(
                mixer=_lightning(fields, slopes) if kind == 0 else _softmax(fields),
                mlp=_experts(fields, num_experts[i]) if num_experts[i] > 1 else _dense(fields),
                shared=SharedSpec(shared[i], "mixed") if shared[i] else None,
                mixer_residual=_residual(fields, f"{prefix}_alpha", f"{prefix}_beta"),
                mlp_residual=_residual(fields, "layernorm_mlp_alpha", "layernorm_mlp_beta"),
            )
        )
    return read_model(fields, layers, architecture, postnorm=fields.flag("postnorm", False))


def hf_layer_factor(i: int, num_layers: int) -> float:
    """The slopes as Hugging Face's class computes them, with the 1e-5 inside the division too."""
    return 1.0 - i / (num_layers - 1 + 1e-5) + 1e-5


def _lightning(fields: Fields, slopes: tuple[float, ...]) -> LightningSpec:
    return LightningSpec(
        num_heads=fields.positive("num_attention_heads"),
        head_dim=read_head_dim(fields),
        slopes=slopes,
        scale=1.0,
        has_silu=True,
        is_interleaved=True,
        norm_eps=INNER_NORM_EPS,
    )


def _softmax(fields: Fields) -> SoftmaxSpec:
    num_heads = fields.positive("num_attention_heads")
    num_kv_heads = fields.positive(
        "num_key_value_heads", num_heads if fields.is_null("num_key_value_heads") else DEFAULT_KV_HEADS
    )
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads})"
        )
    return SoftmaxSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=read_head_dim(fields),
        rope=read_rope(fields, DEFAULT_ROPE_THETA),
    )


def _dense(fields: Fields) -> DenseSpec:
    return DenseSpec(fields.positive("intermediate_size"))


def _experts(fields: Fields, num_experts: int) -> ExpertsSpec:
    top_k = fields.positive("num_experts_per_tok", DEFAULT_TOP_K)
    if top_k > num_experts:
        raise CheckpointError(f"config.json: num_experts_per_tok ({top_k}) exceeds num_local_experts ({num_experts})")
    return ExpertsSpec(fields.positive("intermediate_size"), num_experts, top_k, SoftmaxRoute())


def _experts_field(fields: Fields) -> str:
    """The name of the number of experts: transformers reads num_experts as another name of num_local_experts."""
    if not fields.has("num_experts"):
        return "num_local_experts"
    if fields.has("num_local_experts"):
        fields.must_be_same("num_experts", "num_local_experts")
    return "num_experts"


def _residual(fields: Fields, alpha: str, beta: str) -> Residual:
    return Residual(alpha=fields.number(alpha, 1.0), beta=fields.number(beta, 1.0))
