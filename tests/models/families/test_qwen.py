"""Qwen3-Next and Qwen3.5: config.json in normal form, what is refused, and folders laid out as the official ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import answer, make_core
from leyden.engine.errors import CheckpointError
from leyden.models.families.registry import from_hf, names_of, read_config
from leyden.models.specs import (
    DenseSpec,
    ExpertsSpec,
    GatedDeltaSpec,
    NormSpec,
    RopeSpec,
    SharedSpec,
    SoftmaxRoute,
    SoftmaxSpec,
)
from qwen_models import DENSE, EXPERTS, MOE, NEXT, ROPE, TINY, fuse_experts, make_model, save_model, wrap
from safetensors.torch import load_file, save_file
from tiny_models import greedy, random_prompt

SHAPES = Path(__file__).parents[3] / "benchmarks" / "configs"
WRAPPED = "Qwen3_5ForConditionalGeneration"
# As released: rope and its older neighbours beside each other, and no layer_types.
RELEASED_NEXT: dict[str, Any] = {
    "architectures": [NEXT],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def tiny(architecture: str = DENSE, **changes: Any) -> dict[str, Any]:
    experts = {} if architecture == DENSE else EXPERTS | {"shared_expert_intermediate_size": 32}
    return {"architectures": [architecture], **TINY, **experts, "rope_parameters": ROPE} | changes


# -- normal form -------------------------------------------------------------------------------------------------


def check_layers(spec: Any, num_layers: int, num_value_heads: int, is_grouped: bool) -> None:
    assert len(spec.layers) == num_layers
    assert [i for i, layer in enumerate(spec.layers) if isinstance(layer.mixer, SoftmaxSpec)] == [
        *range(3, num_layers, 4)
    ]
    assert spec.layers[0].mixer == GatedDeltaSpec(
        num_key_heads=16,
        num_value_heads=num_value_heads,
        key_dim=128,
        value_dim=128,
        norm_eps=1e-6,
        gate_activation="silu",
        is_grouped=is_grouped,
    )
    softmax = spec.layers[3].mixer
    assert (softmax.head_dim, softmax.rope, softmax.has_gate) == (256, RopeSpec(64, 1e7), True)
    assert softmax.qk_norm == spec.norm == NormSpec(1e-6, is_zero_centred=True)


def test_qwen3_5_9b_in_normal_form():
    spec = read_config(SHAPES / "qwen3.5-9b")
    check_layers(spec, 32, 32, is_grouped=False)
    assert (spec.hidden_size, spec.vocab_size, spec.max_model_len, spec.dtype) == (4096, 248320, 262144, "bfloat16")
    assert (spec.postnorm, spec.tie_word_embeddings, spec.eos_token_ids) == (False, False, (248044,))
    assert (spec.layers[3].mixer.num_heads, spec.layers[3].mixer.num_kv_heads) == (16, 4)
    assert all((layer.mlp, layer.shared) == (DenseSpec(12288), None) for layer in spec.layers)


def test_qwen3_5_35b_a3b_in_normal_form():
    spec = read_config(SHAPES / "qwen3.5-35b-a3b")
    check_layers(spec, 40, 32, is_grouped=False)
    assert (spec.hidden_size, spec.layers[3].mixer.num_kv_heads) == (2048, 2)
    for layer in spec.layers:
        assert layer.mlp == ExpertsSpec(512, 256, 8, SoftmaxRoute(has_float32_gate=False))
        assert layer.shared == SharedSpec(512, "gated")


def test_qwen3_next_in_normal_form():
    spec = from_hf(RELEASED_NEXT)
    check_layers(spec, 48, 32, is_grouped=True)
    assert (spec.hidden_size, spec.vocab_size, spec.max_model_len, spec.dtype) == (2048, 151936, 262144, "bfloat16")
    for layer in spec.layers:
        assert (layer.mlp, layer.shared) == (
            ExpertsSpec(512, 512, 10, SoftmaxRoute(has_float32_gate=False)),
            SharedSpec(512, "gated"),
        )


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({"mlp_only_layers": [0, 3]}, [0, 3]),
        ({"decoder_sparse_step": 2}, [0, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 1, 2]),
        ({"num_experts": 0}, [0, 1, 2, 3]),
    ],
)
def test_layers_of_next_without_experts(changes, dense):
    layers = from_hf(tiny(NEXT, **changes)).layers
    assert [i for i, layer in enumerate(layers) if isinstance(layer.mlp, DenseSpec)] == dense
    assert all((layer.shared is None) == isinstance(layer.mlp, DenseSpec) for layer in layers)


@pytest.mark.parametrize(
    ("changes", "full"),
    [
        ({}, [3]),
        ({"full_attention_interval": 2}, [1, 3]),
        ({"layer_types": ["full_attention", *["linear_attention"] * 3], "full_attention_interval": 4}, [0]),
    ],
)
def test_full_layers_are_listed_or_every_so_many(changes, full):
    layers = from_hf(tiny(**changes)).layers
    assert [i for i, layer in enumerate(layers) if isinstance(layer.mixer, SoftmaxSpec)] == full


@pytest.mark.parametrize(
    ("stored", "activation"), [(None, "silu"), ("swish", "silu"), ("silu", "silu"), ("sigmoid", "sigmoid")]
)
def test_gate_of_the_delta_net(stored, activation):
    assert from_hf(tiny(output_gate_type=stored)).layers[0].mixer.gate_activation == activation


@pytest.mark.parametrize(
    ("inside", "outside", "tied"), [(True, False, True), (False, True, False), (None, True, True), (None, None, False)]
)
def test_text_config_wins_over_fields_beside_it(inside, outside, tied):
    text = tiny(tie_word_embeddings=inside, dtype=None, eos_token_id=None)
    config = {"architectures": [WRAPPED], "text_config": text, "tie_word_embeddings": outside}
    spec = from_hf(config | {"dtype": "bfloat16", "eos_token_id": 7, "hidden_size": 1})
    assert (spec.architecture, spec.tie_word_embeddings) == (WRAPPED, tied)
    assert (spec.dtype, spec.eos_token_ids, spec.hidden_size) == ("bfloat16", (7,), 64)


def test_a_vision_models_text_is_the_text_model():
    text = tiny()
    wrapped = from_hf({"architectures": [WRAPPED], "text_config": text, "vision_config": {"hidden_size": 3}})
    assert wrapped.layers == from_hf(text).layers


def test_stretched_rope_reaches_further_than_max_position_embeddings():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mrope_section": [2, 1, 1]}
    spec = from_hf(tiny(rope_parameters=ROPE | yarn))
    assert (spec.max_model_len, spec.layers[3].mixer.rope.yarn.factor) == (4096, 4.0)


def test_a_quarter_of_each_head_is_rotated_unless_the_config_says_otherwise():
    rope = {"rope_type": "default", "rope_theta": 1e4}
    assert from_hf(tiny(rope_parameters=rope)).layers[3].mixer.rope == RopeSpec(4, 1e4)
    assert from_hf(tiny(rope_parameters=rope, partial_rotary_factor=1.0)).layers[3].mixer.rope == RopeSpec(16, 1e4)


def test_attention_without_a_gate():
    assert not from_hf(tiny(attn_output_gate=False)).layers[3].mixer.has_gate


# -- what is refused ---------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"output_gate_type": "tanh"},
        "output_gate_type = 'tanh' is not supported (supported: 'silu', 'swish', ",
    ),
    ({"layer_scale": True}, "layer_scale = True is not supported"),
    ({"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim = 3 is not supported (supported: 4)"),
    ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype = 'bfloat16' is not supported (supported: 'float32')"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"norm_topk_prob": False}, "norm_topk_prob = False"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ({"mlp_only_layers": [1]}, "mlp_only_layers = [1]"),
    ({"layer_types": ["linear_attention"] * 3}, "layer_types must list 4 layers"),
    ({"layer_types": ["linear_attention"] * 3 + ["sliding_attention"]}, "got 'sliding_attention'"),
    ({"layer_types": ["full_attention"] * 4}, "no linear layer"),
    ({"full_attention_interval": 1}, "no linear layer"),
    ({"linear_num_value_heads": 3}, "linear_num_key_heads (2) must divide linear_num_value_heads (3)"),
    ({"num_key_value_heads": 3}, "num_key_value_heads (3) must divide num_attention_heads (4)"),
    ({"head_dim": None}, "head_dim is missing"),
    ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
    ({"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}, "rope_type = 'linear' is not supported"),
    ({"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale = 1.0"),
    ({"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 0.0}}, "factor must be positive"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling = "),
    ({"text_config": [1]}, "text_config must be an object"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(changes, words):
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        from_hf(tiny(**changes))
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok (9) exceeds num_experts (8)"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers must list layers below 4, got [4]"),
        ({"mlp_only_layers": 1}, "mlp_only_layers must list layers below 4, got 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be positive"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
    ],
)
def test_wrong_experts_of_next_are_refused(changes, words):
    with pytest.raises(CheckpointError, match=re.escape(words)):
        from_hf(tiny(NEXT, **changes))


def test_other_models_of_the_same_makers_are_refused_with_those_that_are_served():
    with pytest.raises(CheckpointError, match=r"model_type 'qwen4_exp'\); supported: .*Qwen3_5MoeForConditionalGen"):
        from_hf({"architectures": ["Qwen4ExpForConditionalGeneration"], "model_type": "qwen4_exp"})


# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.linear_attn.A_log",
        "model.layers.0.linear_attn.in_proj_ba.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.shared_expert.up_proj.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
    ],
)
def test_names_come_back_as_released_from_the_canonical_ones(stored):
    names = names_of(from_hf(tiny(NEXT)))
    assert names.as_spelt(names.canonical(stored), ["model.layers.0.input_layernorm.weight"]) == stored
    wrapped = names_of(from_hf({"architectures": [WRAPPED], "text_config": tiny()}))
    inside = stored if stored.startswith("lm_head") else stored.replace("model.", "model.language_model.", 1)
    assert wrapped.canonical(inside) == names.canonical(stored)
    assert wrapped.as_spelt(wrapped.canonical(inside), ["model.visual.x", "lm_head.weight", "mtp.fc.weight"]) == inside


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(make_core(folder).runner.served.model.named_parameters())


def test_experts_in_one_tensor_and_one_by_one_fill_the_same_parameters(tmp_path):
    for architecture in (NEXT, MOE):
        folder = tmp_path / architecture
        save_model(folder, make_model(architecture))
        one_by_one = parameters(folder)
        save_file(fuse_experts(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        fused = parameters(folder)
        assert all(torch.equal(fused[name], parameter) for name, parameter in one_by_one.items())


def test_decay_and_step_of_a_half_precision_file_are_float32(tmp_path):
    model = make_model(DENSE).bfloat16()
    save_model(tmp_path, model)
    found = parameters(tmp_path)
    stored = model.model.layers[0]
    assert torch.equal(found["layers.0.mixer.decay"], stored.linear_attn.A_log.float())
    assert torch.equal(found["layers.0.mixer.step_bias"], stored.linear_attn.dt_bias.float())
    assert torch.equal(found["layers.0.input_norm.weight"], stored.input_layernorm.weight.float() + 1.0)


# -- a folder as the official ones -------------------------------------------------------------------------------

BESIDE = ("preprocessor_config.json", "video_preprocessor_config.json", "merges.txt", "vocab.json", "README.md")


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> tuple[Path, Any]:
    """Of the real vocabulary's size, with two stop ids and the files of images beside the weights."""
    folder = tmp_path_factory.mktemp("official")
    model = make_model(MOE, vocab_size=248320, hidden_size=32)
    save_model(folder, model)
    wrap(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"eos_token_id": 248044, "mtp_num_hidden_layers": 1, "mamba_ssm_dtype": "float32"}
    config |= {"image_token_id": 248056, "video_token_id": 248057, "vision_start_token_id": 248053}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [248046, 248044], "top_k": 20}))
    for name in BESIDE:
        (folder / name).write_text("{}")
    (folder / "tokenizer.json").unlink()  # which has a token for few of these ids, and so only those would be drawn
    return folder, model


def test_official_folder_answers_as_transformers_and_says_what_it_leaves_out(official, caplog):
    folder, model = official
    with caplog.at_level("INFO", "leyden.models"):
        core = make_core(folder, cpu_memory_gb=0.2)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith(": 2 of the layers that predict several tokens, 5 of the vision encoder")
    assert read_config(folder).eos_token_ids == (248044, 248046)
    assert answer(core, random_prompt(9, 9), max_tokens=8).token_ids == greedy(model, random_prompt(9, 9), 8)


def test_missing_tensor_of_an_official_folder_is_named_as_its_files_would(official, tmp_path):
    folder, _ = official
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    held = load_file(tmp_path / "layers-0.safetensors")
    lost = "model.language_model.layers.0.linear_attn.dt_bias"
    del held[lost]
    save_file(held, tmp_path / "layers-0.safetensors")
    with pytest.raises(CheckpointError, match=rf"missing tensors: {lost} \[4\]$"):
        make_core(tmp_path)
