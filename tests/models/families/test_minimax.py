"""Both spellings of a MiniMax config.json become one spec, and a field that cannot be honoured is refused by name."""

from __future__ import annotations

import json
import math

import pytest
import torch
from leyden.kernels import load
from leyden.models.decoder import Decoder
from leyden.models.errors import CheckpointError
from leyden.models.families.common import alibi_slopes, geometric_slopes, layer_factor
from leyden.models.families.minimax import hf_layer_factor
from leyden.models.families.registry import from_hf
from leyden.models.layers.build import Build
from leyden.models.mixers.backends import build_backends
from leyden.models.mixers.cache import ItemSizes, slot_bytes, token_bytes
from leyden.models.specs import (
    DenseSpec,
    ExpertsSpec,
    LightningSpec,
    ModelSpec,
    RopeSpec,
    SharedSpec,
    SoftmaxRoute,
    SoftmaxSpec,
)
from transformers import MiniMaxConfig

# As released.
TEXT_01 = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "model_type": "minimax_text_01",
    "auto_map": {"AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config"},
    "vocab_size": 200064,
    "hidden_size": 6144,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9216,
    "num_local_experts": 32,
    "num_experts_per_tok": 2,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "rotary_dim": 64,
    "rope_theta": 10000000,
    "max_position_embeddings": 10240000,
    "rms_norm_eps": 1e-05,
    "postnorm": True,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
RENAMED = {
    "layernorm_full_attention_alpha": "full_attn_alpha_factor",
    "layernorm_full_attention_beta": "full_attn_beta_factor",
    "layernorm_linear_attention_alpha": "linear_attn_alpha_factor",
    "layernorm_linear_attention_beta": "linear_attn_beta_factor",
    "layernorm_mlp_alpha": "mlp_alpha_factor",
    "layernorm_mlp_beta": "mlp_beta_factor",
}
TEXT_01_HF = {RENAMED.get(key, key): value for key, value in TEXT_01.items() if key != "attn_type_list"} | {
    "architectures": ["MiniMaxForCausalLM"],
    "model_type": "minimax",
    "layer_types": ["full_attention" if kind else "linear_attention" for kind in TEXT_01["attn_type_list"]],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000},
}
del TEXT_01_HF["rope_theta"]


def parse(**changes) -> ModelSpec:
    """The released config with changes; ... removes a key."""
    merged = TEXT_01 | changes
    return from_hf({key: value for key, value in merged.items() if value is not ...})


def mixer(spec: ModelSpec, kind: str):
    """The model's first mixer of that kind."""
    return next(layer.mixer for layer in spec.layers if layer.mixer.kind == kind)


def refused(match: str, base: dict = TEXT_01, **changes) -> None:
    with pytest.raises(CheckpointError, match=match):
        from_hf({key: value for key, value in (base | changes).items() if value is not ...})


def test_released_config_in_normal_form():
    config = parse()
    assert config.layer_counts == {"lightning": 70, "softmax": 10}
    assert [i for i, layer in enumerate(config.layers) if isinstance(layer.mixer, SoftmaxSpec)] == list(range(7, 80, 8))
    assert (config.vocab_size, config.hidden_size, config.max_model_len) == (200064, 6144, 10240000)
    assert config.postnorm and not config.tie_word_embeddings
    assert (config.norm.eps, config.dtype, config.eos_token_ids) == (1e-5, "bfloat16", ())
    linear, full = config.layers[0], config.layers[7]
    assert isinstance(linear.mixer, LightningSpec)
    assert (linear.mixer.num_heads, linear.mixer.head_dim, linear.mixer.scale) == (64, 128, 1.0)
    assert linear.mixer.norm_eps == 1e-6, "not rms_norm_eps"
    assert full.mixer == SoftmaxSpec(num_heads=64, num_kv_heads=8, head_dim=128, rope=RopeSpec(dim=64, theta=1e7))
    for layer in config.layers:
        assert layer.mlp == ExpertsSpec(width=9216, num_experts=32, top_k=2, route=SoftmaxRoute())
        assert layer.shared is None
        assert layer.mixer_residual.alpha == layer.mlp_residual.alpha == 3.5565588200778455
        assert layer.mixer_residual.beta == layer.mlp_residual.beta == 1.0


def test_released_model_keeps_280_mib_of_a_sequence_and_40_kib_of_a_token():
    kernels, sizes = load("torch"), ItemSizes(state=4, activation=2)
    build = Build(kernels, torch.device("meta"), torch.bfloat16)
    caches = Decoder(parse(), build, build_backends("minimax", parse(), kernels)).caches
    assert (slot_bytes(caches, sizes), token_bytes(caches, sizes)) == (280 * 2**20, 40 * 2**10)


def test_m1_is_the_same_network():
    m1 = parse(architectures=["MiniMaxM1ForCausalLM"], model_type="minimax_m1")
    assert m1.layers == parse().layers and m1.architecture == "MiniMaxM1ForCausalLM"


def test_both_spellings_of_the_released_model_agree_but_for_a_rounding_of_the_slopes():
    original, hf = parse(), from_hf(TEXT_01_HF)
    for field in ("vocab_size", "hidden_size", "norm", "postnorm", "max_model_len", "dtype"):
        assert getattr(original, field) == getattr(hf, field)
    for i, (a, b) in enumerate(zip(original.layers, hf.layers, strict=True)):
        assert (a.mlp, a.mixer_residual, a.mlp_residual) == (b.mlp, b.mixer_residual, b.mlp_residual)
        if isinstance(a.mixer, LightningSpec):
            assert isinstance(b.mixer, LightningSpec)
            tolerance = 0.02 if i == 79 else 1e-3
            assert a.mixer.slopes == pytest.approx(b.mixer.slopes, rel=tolerance)
        else:
            assert a.mixer == b.mixer, "the released checkpoint is partially rotated, however it is spelled"


def test_residual_factors_go_to_their_own_kind_of_layer():
    changes = {key: float(i) for i, key in enumerate(RENAMED, start=1)}
    for config in (parse(**changes), from_hf(TEXT_01_HF | {RENAMED[k]: v for k, v in changes.items()})):
        linear, full = config.layers[0], config.layers[7]
        assert (full.mixer_residual.alpha, full.mixer_residual.beta) == (1.0, 2.0)
        assert (linear.mixer_residual.alpha, linear.mixer_residual.beta) == (3.0, 4.0)
        assert {(each.mlp_residual.alpha, each.mlp_residual.beta) for each in (linear, full)} == {(5.0, 6.0)}


def test_absent_factors_are_one():
    config = parse(**dict.fromkeys(RENAMED, ...))
    assert {(x.mixer_residual.alpha, x.mixer_residual.beta) for x in config.layers} == {(1.0, 1.0)}


def test_hugging_face_is_always_postnorm_and_the_original_only_when_it_says_so():
    assert from_hf(TEXT_01_HF | {"postnorm": False}).postnorm
    assert not parse(postnorm=False).postnorm and not parse(postnorm=...).postnorm


def test_hugging_face_without_layer_types_begins_with_softmax():
    config = from_hf({k: v for k, v in TEXT_01_HF.items() if k != "layer_types"})
    assert [isinstance(layer.mixer, SoftmaxSpec) for layer in config.layers[:4]] == [True, False, True, False]


@pytest.mark.parametrize(
    ("changes", "rotary_dim"),
    [
        ({"rotary_dim": 32}, 32),
        ({"rotary_dim": ...}, 128),
        ({"rotary_dim": ..., "partial_rotary_factor": 0.25}, 32),
        ({"rotary_dim": ..., "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, 64),
    ],
)
def test_width_of_the_rotation(changes, rotary_dim):
    assert mixer(parse(**changes), "softmax").rope.dim == rotary_dim


def test_head_dim_follows_from_the_width_when_it_is_absent():
    assert mixer(parse(head_dim=..., rotary_dim=...), "softmax").head_dim == 96


def test_layers_may_differ_in_experts_and_shared_width():
    config = parse(num_local_experts=[1, 32] * 40, shared_intermediate_size=[64] + [0] * 79)
    assert [isinstance(layer.mlp, ExpertsSpec) for layer in config.layers[:3]] == [False, True, False]
    assert [layer.shared for layer in config.layers[:3]] == [SharedSpec(64, "mixed"), None, None]
    assert parse(num_local_experts=1).layers[0].mlp == DenseSpec(width=9216)


def test_number_of_experts_has_another_name():
    for base in (TEXT_01, TEXT_01_HF):
        same = {"num_experts": 4, "num_local_experts": 4}
        for names in ({"num_experts": 4, "num_local_experts": ...}, same):
            config = {key: value for key, value in (base | names).items() if value is not ...}
            assert from_hf(config).layers[0].mlp.num_experts == 4
        refused("num_experts = 4 contradicts num_local_experts = 32", base, num_experts=4)


def test_dtype_auto_says_as_little_as_nothing():
    assert parse(torch_dtype="auto").dtype is None and parse(dtype="auto").dtype is None


@pytest.mark.parametrize("base", [TEXT_01, TEXT_01_HF], ids=["original", "hf"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_that_is_not_scaled_may_be_said_to_be_so(base, kind):
    plain = from_hf(base)
    theta = base.get("rope_theta") or base["rope_parameters"]["rope_theta"]
    assert from_hf(base | {"rope_scaling": {kind: "default", "rope_theta": theta}}) == plain


# -- defaults -------------------------------------------------------------------------------------------------

# Of every field another value than its default's, so that a default cannot be taken for it.
UNUSUAL = MiniMaxConfig(
    vocab_size=100,
    hidden_size=256,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=1024,
    rms_norm_eps=1e-3,
    bos_token_id=11,
    eos_token_id=12,
    tie_word_embeddings=True,
    num_experts_per_tok=3,
    num_local_experts=5,
    rope_parameters={"rope_type": "default", "rope_theta": 123.0, "partial_rotary_factor": 0.5},
    layer_types=["linear_attention", "linear_attention", "full_attention"],
    **{name: 2.0 + i for i, name in enumerate(RENAMED.values())},
    architectures=["MiniMaxForCausalLM"],
    dtype="bfloat16",
).to_dict()
NEEDED = {
    "architectures",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
}


def without(config: dict, path: tuple[str, ...]) -> dict:
    """A copy that lacks one field, which may be in a section."""
    copy = json.loads(json.dumps(config))
    section = copy
    for name in path[:-1]:
        section = section[name]
    del section[path[-1]]
    return copy


PATHS = [(name,) for name in UNUSUAL if name not in NEEDED]
PATHS += [("rope_parameters", name) for name in UNUSUAL["rope_parameters"]]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_field_that_is_left_out_has_the_default_of_transformers_own_class(path):
    partial = without(UNUSUAL, path)
    filled = MiniMaxConfig.from_dict(partial).to_dict()
    assert from_hf(partial) == from_hf(filled)


# eos_token_id: the original's class has none.
SHARED = sorted((TEXT_01.keys() & UNUSUAL.keys() | {"rope_theta"}) - NEEDED - {"model_type", "eos_token_id"})


@pytest.mark.parametrize("name", SHARED)
def test_field_that_the_original_spells_alike_has_the_same_default(name):
    own = MiniMaxConfig().to_dict()
    default = (own | own["rope_parameters"])[name]
    unusual = {key: UNUSUAL[key] for key in SHARED if key in UNUSUAL and UNUSUAL[key] is not None}
    base = TEXT_01 | unusual | {"rope_theta": 123.0, "num_attention_heads": 16, "hidden_size": 256, "rotary_dim": 8}
    assert from_hf(without(base, (name,))) == from_hf(base | {name: default})


def test_null_key_value_heads_are_as_many_as_heads():
    for base in (TEXT_01, TEXT_01_HF):
        heads = mixer(from_hf(base | {"num_key_value_heads": None}), "softmax")
        assert heads.num_kv_heads == heads.num_heads == 64


def test_other_name_of_the_layer_kinds():
    kinds = TEXT_01["attn_type_list"]
    assert parse(attn_type_list=..., decoder_attention_types=kinds).layers == parse().layers


# -- slopes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 64])
def test_slopes_of_a_power_of_two_are_geometric_in_both_spellings(heads):
    assert alibi_slopes(heads) == geometric_slopes(heads)
    assert alibi_slopes(heads)[-1] == pytest.approx(2.0**-8)
    ratios = [b / a for a, b in zip(alibi_slopes(heads), alibi_slopes(heads)[1:], strict=False)]
    assert all(ratio == pytest.approx(2 ** (-8 / heads)) for ratio in ratios)


def test_slopes_of_six_heads_interleave_as_alibi_and_not_as_hugging_face():
    assert alibi_slopes(6) == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert geometric_slopes(6)[:2] == pytest.approx([0.39685, 0.15749], rel=1e-4)
    six = {"num_attention_heads": 6, "num_key_value_heads": 2}
    f = layer_factor(0, 80)
    assert mixer(parse(**six), "lightning").slopes == pytest.approx([f * s for s in alibi_slopes(6)])
    hf = mixer(from_hf(TEXT_01_HF | six), "lightning").slopes
    assert hf == pytest.approx([hf_layer_factor(0, 80) * s for s in geometric_slopes(6)])


def test_layer_factor_falls_from_one_to_almost_nothing_over_all_layers():
    assert layer_factor(0, 80) == pytest.approx(1 + 1e-5)
    assert layer_factor(79, 80) == pytest.approx(1e-5)
    assert hf_layer_factor(79, 80) == pytest.approx(1.0127e-5, rel=1e-4)
    factors = [layer_factor(i, 80) for i in range(80)]
    assert factors == sorted(factors, reverse=True) and min(factors) > 0
    assert layer_factor(0, 1) == 1 + 1e-5
    assert all(math.isfinite(s) and s > 0 for layer in parse().layers[:7] for s in layer.mixer.slopes)


def test_layers_are_counted_with_the_softmax_layers():
    config = parse()
    eighth = config.layers[8].mixer
    assert eighth.slopes[0] == pytest.approx(alibi_slopes(64)[0] * (1 - 8 / 79 + 1e-5))


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
     "max_position_embeddings", "attn_type_list"],
)  # fmt: skip
def test_missing_field_is_named(field):
    refused(f"{field} is missing", **{field: ...})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", -1),
        ("vocab_size", "200064"),
        ("vocab_size", True),
        ("hidden_size", 1.5),
        ("num_hidden_layers", 0),
        ("head_dim", 0),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "small"),
        ("rope_theta", "big"),
        ("postnorm", 1),
        ("tie_word_embeddings", "no"),
        ("layernorm_mlp_alpha", float("inf")),
        ("layernorm_mlp_alpha", [1.0]),
        ("attn_type_list", 0),
        ("attn_type_list", [0] * 79),
        ("attn_type_list", [2] * 80),
        ("attn_type_list", [[]] * 80),
        ("num_local_experts", [32] * 3),
        ("num_local_experts", "many"),
        ("num_local_experts", ["many"] * 80),
        ("num_local_experts", -1),
        ("shared_intermediate_size", "wide"),
        ("shared_intermediate_size", -4),
        ("num_experts_per_tok", 33),
        ("num_key_value_heads", 7),
        ("rotary_dim", 200),
        ("rotary_dim", 63),
        ("eos_token_id", "<end>"),
        ("eos_token_id", [1, None]),
        ("rope_parameters", [1]),
        ("torch_dtype", 16),
    ],
)
def test_wrong_field_is_named(field, value):
    refused(field, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("sliding_window", 4096),
        ("rope_scaling", {"type": "yarn", "factor": 4}),
        ("shared_moe_mode", "mean"),
    ],
)
def test_what_would_change_the_mathematics_is_refused(field, value):
    refused(f"{field} .* not supported", **{field: value})


def test_scaled_rope_is_refused_in_the_other_spelling():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e7}
    refused("rope_type = 'yarn' is not supported", TEXT_01_HF, rope_parameters=rope)


def test_softmax_shared_mode_is_refused_only_where_a_shared_expert_exists():
    refused("shared_moe_mode", shared_moe_mode="softmax", shared_intermediate_size=64)
    parse(shared_moe_mode="softmax", shared_intermediate_size=0)


def test_model_without_lightning_layers_is_refused():
    refused("no linear layer", attn_type_list=[1] * 80)


def test_wrong_layer_types_are_refused():
    refused("layer_types", TEXT_01_HF, layer_types=["linear_attention"] * 3)
    refused("sliding_attention", TEXT_01_HF, layer_types=["linear_attention"] * 79 + ["sliding_attention"])
