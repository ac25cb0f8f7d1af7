"""Ring-linear-2.0: groups of lightning layers that each end in a softmax layer, and experts behind all but the first.

"Every Attention Matters: An Efficient Hybrid Architecture for Long-Context Reasoning" (Ling team 2025).

**slope_layer_offset**, a field that may be added to config.json, settles a point on which codes disagree. Layer i of L,
counted from 0, forgets by 1 - (i - offset)/(L-1) + 1e-5. The engines that served the released models (flood, SGLang)
compute offset 0, which is the default here. The code beside the weights computes offset 1, as if i counted from 1.
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
    NormSpec,
    Residual,
    SharedSpec,
    SigmoidGroupRoute,
    SoftmaxSpec,
)
from .common import alibi_slopes, layer_factor, read_head_dim, read_model, read_rope
from .fields import Fields

PLAIN = Residual(1.0, 1.0)
# Fields whose other values would change the mathematics, with the values that are served; () = absent only. Sources
# disagree on linear_silu: an activation of q, k and v, or of the gate.
SERVED: dict[str, tuple[Any, ...]] = {
    "linear_rope": (True,),
    "linear_silu": (False,),
    "moe_router_enable_expert_bias": (True,),
    "moe_router_enable_routed_scaling": (True,),
    "moe_router_enable_shared_expert": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "norm_topk_prob": (True,),
    "num_nextn_predict_layers": (0,),
    "quantization": (),
    "rope_interleave": (False,),
    "rope_traditional": (False,),
    "router_dtype": ("fp32",),
    "score_function": ("sigmoid",),
    "slope_layer_offset": (0, 1),
    "use_bias": (False,),
    "use_linear_silu": (False,),
    "use_qkv_bias": (False,),
    "use_rmsnorm": (True,),
    "use_sliding_window": (False,),
    "using_split_qkv_in_self_attention": (False,),
}

# Parts of tensors' names, in files and here.
SPELLINGS = {
    "word_embeddings.": "embed_tokens.",
    ".attention.query_key_value.": ".self_attn.qkv_proj.",
    ".attention.query_layernorm.": ".self_attn.q_norm.",
    ".attention.key_layernorm.": ".self_attn.k_norm.",
    ".attention.g_proj.": ".self_attn.output_gate.",
    ".attention.g_norm.": ".self_attn.norm.",
    ".mlp.shared_experts.": ".shared_mlp.",
}


def read(config: Mapping[str, Any], architecture: str) -> ModelSpec:
    """`BailingMoeLinearV2ForCausalLM`. Raises `CheckpointError`."""
    fields = Fields(config)
    fields.must_all_be(SERVED)
    num_dense = fields.integer("first_k_dense_replace")
    layers = []
    for i in range(fields.positive("num_hidden_layers")):
        is_dense = i < num_dense
        layers.append(
            LayerSpec(
                mixer=_softmax(fields) if _is_softmax(fields, i) else _lightning(fields, i),
                mlp=DenseSpec(fields.positive("intermediate_size")) if is_dense else _experts(fields),
                mixer_residual=PLAIN,
                mlp_residual=PLAIN,
                shared=None if is_dense else _shared(fields),
            )
        )
    return read_model(fields, layers, architecture, postnorm=False)


def _is_softmax(fields: Fields, i: int) -> bool:
    """The last layer of each group attends by softmax, and so do layers behind the last whole group."""
    size, num_layers = fields.positive("layer_group_size"), fields.positive("num_hidden_layers")
    return (i + 1) % size == 0 or i >= num_layers // size * size


def _lightning(fields: Fields, i: int) -> LightningSpec:
    num_heads, head_dim = fields.positive("num_attention_heads"), read_head_dim(fields)
    factor = layer_factor(i - fields.integer("slope_layer_offset", 0), fields.positive("num_hidden_layers"))
    return LightningSpec(
        num_heads=num_heads,
        head_dim=head_dim,
        slopes=tuple(slope * factor for slope in alibi_slopes(num_heads)),
        scale=head_dim**-0.5,
        has_silu=False,
        is_interleaved=False,
        norm_eps=fields.above_zero("rms_norm_eps"),
        norm_groups=fields.divisor("group_norm_size", num_heads * head_dim, "num_attention_heads * head_dim"),
        qk_norm=_qk_norm(fields),
        rope=read_rope(fields),
    )


def _softmax(fields: Fields) -> SoftmaxSpec:
    num_heads = fields.positive("num_attention_heads")
    return SoftmaxSpec(
        num_heads=num_heads,
        num_kv_heads=fields.divisor("num_key_value_heads", num_heads, "num_attention_heads"),
        head_dim=read_head_dim(fields),
        rope=read_rope(fields),
        qk_norm=_qk_norm(fields),
        is_fused=True,
    )


def _qk_norm(fields: Fields) -> NormSpec | None:
    return NormSpec(fields.above_zero("rms_norm_eps")) if fields.flag("use_qk_norm") else None


def _experts(fields: Fields) -> ExpertsSpec:
    num_experts, top_k = fields.positive("num_experts"), fields.positive("num_experts_per_tok")
    num_groups, num_kept = fields.divisor("n_group", num_experts, "num_experts"), fields.positive("topk_group")
    if num_kept > num_groups:
        raise CheckpointError(f"config.json: topk_group ({num_kept}) exceeds n_group ({num_groups})")
    num_allowed = num_kept * num_experts // num_groups
    if top_k > num_allowed:
        raise CheckpointError(
            f"config.json: num_experts_per_tok ({top_k}) exceeds the {num_allowed} experts of topk_group ({num_kept})"
        )
    scale = fields.above_zero("routed_scaling_factor", 1.0)
    return ExpertsSpec(
        fields.positive("moe_intermediate_size"), num_experts, top_k, SigmoidGroupRoute(num_groups, num_kept, scale)
    )


def _shared(fields: Fields) -> SharedSpec | None:
    """All shared experts as one: their rows, side by side, make a wider MLP."""
    width = fields.positive("moe_shared_expert_intermediate_size", fields.positive("moe_intermediate_size"))
    count = fields.integer("num_shared_experts")
    return SharedSpec(count * width, "added") if count else None


def names(spec: ModelSpec) -> Names:
    """The spellings of this model's checkpoints."""
    lightning = "|".join(str(i) for i, layer in enumerate(spec.layers) if isinstance(layer.mixer, LightningSpec))
    return Names(
        renames=(
            Rename(re.compile(r"^model\."), ""),
            *(Rename(re.compile(re.escape(stored)), canonical) for stored, canonical in SPELLINGS.items()),
            # Files call the last projection of either mixer `dense`.
            Rename(re.compile(rf"^(layers\.(?:{lightning})\.)attention\.dense\."), r"\1self_attn.out_proj."),
            Rename(re.compile(r"\.attention\.dense\."), ".self_attn.o_proj."),
        ),
        released=(
            *(Released.back(re.escape(canonical), stored) for stored, canonical in SPELLINGS.items()),
            Released.back(r"\.self_attn\.(?:out|o)_proj\.", ".attention.dense."),
            Released(re.compile(r"^(?!lm_head\.)"), "model.", re.compile(r"^(?!model\.|lm_head\.)")),
        ),
        ignored=re.compile(r"\.rotary_emb\.inv_freq$"),
    )
