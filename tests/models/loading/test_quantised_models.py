"""A model answers from a quantised checkpoint as from the dequantised one, whatever the names in its ignore list."""

from __future__ import annotations

import json

import pytest
import torch
from engines import answer, engine_config, make_core
from leyden.engine.errors import ConfigError
from leyden.engine.startup.model import load_model, place_model
from leyden.models.errors import CheckpointError, WeightFormatError
from leyden.models.layers.build import matrices_of
from quantised_checkpoints import FINE, FORMATS, Published, quantise_folder
from qwen_models import DENSE, MOE, NEXT, make_model, save_model
from safetensors.torch import load_file, save_file
from tiny_models import random_prompt

PROMPT = random_prompt(20, seed=4)
# Blocks of 128 do not cut the pieces of the first; those of the second begin at multiples of 128.
NARROW = {"num_hidden_layers": 4}
WIDE = {
    "hidden_size": 128,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 128,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 64,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_experts": 4,
}
ALL = r"layers\..*(_proj|in_proj_(qkv|z|qkvz))$"  # as the official checkpoints have them
EVERY = r"layers\.|lm_head"  # gates, routers and heads, too
MLPS = r"mlp\.(experts\.\d+\.)?(gate|up|down)_proj$"


def save(folder, architecture: str, sizes: dict) -> None:
    changes = {name: value for name, value in sizes.items() if architecture != DENSE or "expert" not in name}
    changes = {name: value for name, value in changes.items() if architecture != DENSE or "moe" not in name}
    save_model(folder, make_model(architecture, **changes))


def quantised(tmp_path, architecture: str, published: Published, modules=ALL, sizes=WIDE, config=None):
    folder, twin = tmp_path / "quantised", tmp_path / "twin"
    folder.mkdir()
    save(folder, architecture, sizes)
    names = quantise_folder(folder, twin, published, modules, config)
    assert names, "no matrix was quantised"
    return folder, twin


def greedy(folder, **settings) -> list[int]:
    return answer(make_core(folder, **settings), PROMPT, max_tokens=24).token_ids


def kinds(folder, **settings) -> dict[str, set[str]]:
    """The formats of each part of the model."""
    found: dict[str, set[str]] = {}
    for part, weight in matrices_of(place_model(engine_config(folder, **settings), on_meta=True).model):
        found.setdefault(part, set()).add(weight.format)
    return found


CASES = [
    (DENSE, "fp8, bf16 scales", ALL, WIDE, {"mixers": {"fp8"}, "mlp": {"fp8"}}),
    (MOE, "fp8, bf16 scales", ALL, WIDE, {"mixers": {"fp8"}, "mlp": {"fp8"}, "experts": {"fp8"}}),
    (NEXT, "fp8, bf16 scales", ALL, WIDE, {"mixers": {"fp8"}, "mlp": {"fp8"}, "experts": {"fp8"}}),
    (MOE, "fp8, bf16 scales", ALL, NARROW, {"mixers": {"plain", "fp8"}, "mlp": {"plain", "fp8"}}),
    (DENSE, "ct fp8 by channel", ALL, NARROW, {"mixers": {"fp8"}, "mlp": {"fp8"}}),
    (MOE, "ct fp8 by channel", EVERY, NARROW, {"mixers": {"fp8"}, "mlp": {"fp8"}, "experts": {"fp8"}}),
    (NEXT, "ct int8 by channel", EVERY, NARROW, {"mixers": {"int8"}, "mlp": {"int8"}, "experts": {"int8"}}),
    (MOE, "ct int8 by channel", ALL, NARROW, {"mixers": {"int8"}, "mlp": {"int8"}, "experts": {"int8"}}),
    (DENSE, "ct int4 with zeros", ALL, WIDE, {"mixers": {"int4"}, "mlp": {"int4"}}),
    (MOE, "gptq", MLPS, WIDE, {"mixers": {"plain"}, "mlp": {"plain"}, "experts": {"int4"}}),
    (NEXT, "gptq", ALL, WIDE, {"mixers": {"int4"}, "mlp": {"int4"}, "experts": {"int4"}}),
    (DENSE, "gptq in order", MLPS, NARROW, {"mixers": {"plain"}, "mlp": {"plain"}}),
    (MOE, "awq", ALL, WIDE, {"mixers": {"int4"}, "mlp": {"int4"}, "experts": {"int4"}}),
    (DENSE, "modelopt nvfp4", MLPS, NARROW, {"mixers": {"plain"}, "mlp": {"plain"}}),
    (MOE, "ct nvfp4", MLPS, WIDE, {"mixers": {"plain"}, "experts": {"plain"}}),
]


@pytest.mark.parametrize(("architecture", "name", "modules", "sizes", "held"), CASES)
def test_answers_equal_those_of_the_dequantised_twin(architecture, name, modules, sizes, held, tmp_path):
    folder, twin = quantised(tmp_path, architecture, FORMATS[name], modules, sizes)
    assert greedy(folder) == greedy(twin)
    found = kinds(folder)
    assert {part: found[part] for part in held} == held


IGNORED = (
    ["model.layers.0.linear_attn.in_proj_a", "model.layers.0.linear_attn.in_proj_b", "lm_head"],
    ["model.language_model.layers.0.linear_attn.in_proj_a", "model.language_model.layers.0.mlp.gate"],
    ["model.layers.0.linear_attn.in_proj_ba", "mlp.gate", "in_proj_a", "in_proj_b"],
    ["re:.*in_proj_[ab]$", "re:.*mlp.gate$"],
    [],
)


@pytest.mark.parametrize("ignored", IGNORED, ids=str)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_ignore_lists_of_every_spelling_leave_the_tensors_to_decide(ignored, is_wrapped, tmp_path):
    """The gates stay plain whatever the list says. By config.json alone the formats are the same."""
    config = FINE | {"modules_to_not_convert": ignored}
    folder, twin = quantised(tmp_path, MOE, FORMATS["fp8, bf16 scales"], config=config)
    if is_wrapped:
        wrap_quantised(folder)
    assert greedy(folder) == greedy(twin)
    held = {"mixers": {"fp8"}, "mlp": {"fp8"}, "experts": {"fp8"}}
    assert kinds(folder) == held
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert kinds(folder) == held


def wrap_quantised(folder) -> None:
    """Put the text model inside a vision model, as the official checkpoints are."""
    text = json.loads((folder / "config.json").read_text())
    quantization, architecture = text.pop("quantization_config"), text.pop("architectures")[0]
    config = {"architectures": [architecture.replace("ForCausalLM", "ForConditionalGeneration")], "text_config": text}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    tensors = load_file(folder / "model.safetensors")
    inside = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    others = {"mtp.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(2, 2), "model.visual.x.weight": torch.ones(2)}
    save_file(inside | others, folder / "model.safetensors")


def fuse(folder, ends: tuple[str, ...]) -> None:
    """The experts of a layer in one tensor each. ends: of the names of an expert's tensors, `.weight` first."""
    tensors = load_file(folder / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for mlp in {name.partition("experts.")[0] for name in tensors.keys() - fused.keys()}:
        for end in ends:
            gate, up, down = (
                torch.stack([tensors[f"{mlp}experts.{e}.{kind}_proj{end}"] for e in range(4)])
                for kind in ("gate", "up", "down")
            )
            fused[f"{mlp}experts.gate_up_proj{end.removeprefix('.weight')}"] = torch.cat([gate, up], dim=1)
            fused[f"{mlp}experts.down_proj{end.removeprefix('.weight')}"] = down
    save_file(fused, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("fp8, bf16 scales", (".weight", ".weight_scale_inv")),
        ("ct int4", (".weight_packed", ".weight_scale")),
        ("ct int8 by channel", (".weight", ".weight_scale")),
    ],
)
def test_experts_in_one_tensor_are_those_of_one_tensor_each(name, ends, tmp_path):
    folder, twin = quantised(tmp_path, MOE, FORMATS[name], r"experts\.\d")
    before = kinds(folder)
    fuse(folder, ends)
    assert kinds(folder) == before and before["experts"] == {FORMATS[name].held}
    assert greedy(folder) == greedy(twin)


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.fixture
def fp8(tmp_path):
    """(folder, tensors, the name of one matrix)."""
    folder, _ = quantised(tmp_path, DENSE, FORMATS["fp8, bf16 scales"])
    return folder, load_file(folder / "model.safetensors"), "model.layers.3.self_attn.o_proj.weight"


def refused(folder, tensors, *words: str) -> None:
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model(engine_config(folder), progress=False)
    for word in ("model.safetensors", *words):
        assert word in str(error.value), str(error.value)


def test_scale_of_a_wrong_shape_is_refused_with_both_shapes(fp8):
    folder, tensors, name = fp8
    tensors[f"{name}_scale_inv"] = torch.ones(2, 1)
    refused(folder, tensors, f"{name}_scale_inv", "[2, 1]", "[128, 128]", "[1, 1]")


def test_matrix_of_a_wrong_shape_is_refused_with_both_shapes(fp8):
    folder, tensors, name = fp8
    tensors[name] = tensors[name][:, :96].contiguous()
    refused(folder, tensors, name, "[128, 96]", "[128, 128]")


def test_matrix_without_its_scale_is_refused(fp8):
    folder, tensors, name = fp8
    del tensors[f"{name}_scale_inv"]
    refused(folder, tensors, name, "[128, 128]", "without its weight_scale_inv", "'fp8'")


def test_companion_that_the_format_does_not_have_is_refused(fp8):
    folder, tensors, name = fp8
    tensors[f"{name}_scale_2"] = torch.ones(1)
    refused(folder, tensors, f"{name}_scale_2", "[1]", "no part of a matrix", "'fp8'")


def test_companion_that_no_format_has_is_refused(fp8):
    folder, tensors, name = fp8
    tensors[f"{name}_secret"] = torch.ones(1)
    refused(folder, tensors, f"{name}_secret", "unexpected")


def test_scales_of_activations_are_left_out_and_told(fp8, caplog):
    folder, tensors, name = fp8
    before = greedy(folder)
    prefix = name.removesuffix("weight")
    for end in ("input_scale", "k_scale"):
        tensors[prefix + end] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    caplog.set_level("INFO", "leyden.models")
    assert greedy(folder) == before
    assert "2 of the scales of activations" in caplog.text


def test_method_that_the_config_does_not_name_is_refused(fp8):
    folder, tensors, _ = fp8
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FORMATS["gptq"].config
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, tensors, "no part of a matrix", "'gptq'")
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'bitsandbytes' is not supported \(supported: fp8, compressed"):
        place_model(engine_config(folder), on_meta=True)


# -- making ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("architecture", [DENSE, MOE, NEXT])
def test_plain_checkpoint_is_quantised_while_it_is_read(kind, architecture, tmp_path):
    save(tmp_path, architecture, WIDE)
    found = kinds(tmp_path, quantization=kind)
    assert set(found) == ({"mixers", "mlp"} if architecture == DENSE else {"mixers", "mlp", "experts"})
    assert set.union(*found.values()) == {kind}
    plain = load_model(engine_config(tmp_path), progress=False)
    served = load_model(engine_config(tmp_path, quantization=kind, quantization_group=64), progress=False)
    assert served.num_parameters == plain.num_parameters
    assert served.weight_bytes < plain.weight_bytes
    bound = {"fp8": 0.03, "int8": 0.007, "int4": 0.1}[kind]
    for (_, weight), (_, expected) in zip(matrices_of(served.model), matrices_of(plain.model), strict=True):
        matrix = expected.data[..., : weight.shape[-2], :]  # a projection with its gates has more rows
        error = weight.dequantised(torch.float32) - matrix
        assert error.norm() < bound * matrix.norm()
    assert len(greedy(tmp_path, quantization=kind)) == 24


def test_parts_have_formats_of_their_own(tmp_path):
    save(tmp_path, MOE, WIDE)
    chosen = {"experts": "int4", "mixers": "int8"}
    assert kinds(tmp_path, quantization=chosen) == {"experts": {"int4"}, "mixers": {"int8"}, "mlp": {"plain"}}
    assert kinds(tmp_path, quantization="none") == kinds(tmp_path)


def test_routers_gates_norms_and_heads_stay_plain(tmp_path):
    save(tmp_path, MOE, WIDE)
    served = load_model(engine_config(tmp_path, quantization="int4"), progress=False)
    parameters = dict(served.model.named_parameters())
    for name in ("embedding", "lm_head", "layers.0.mlp.router.gate.weight", "layers.0.shared.coefficient"):
        assert parameters[name].dtype == torch.float32, name
    assert parameters["layers.0.mixer.gates.weight"].dtype == torch.float32
    assert parameters["layers.0.mixer.in_proj.weight"].dtype == torch.int32


def test_matrix_of_a_published_format_keeps_it_beside_the_setting(tmp_path):
    folder, _ = quantised(tmp_path, MOE, FORMATS["gptq"], MLPS)
    assert kinds(folder, quantization={"mixers": "int8"}) == {"experts": {"int4"}, "mixers": {"int8"}, "mlp": {"plain"}}
    with pytest.raises(ConfigError, match="has its experts in int4 already, and weights are quantised once; leave"):
        place_model(engine_config(folder, quantization="int8"), on_meta=True)


def test_matrix_that_no_format_holds_may_be_quantised_anew(tmp_path):
    folder, twin = quantised(tmp_path, DENSE, FORMATS["modelopt nvfp4"], MLPS)
    setting = {"mlp": "int8"}
    assert kinds(folder, quantization=setting)["mlp"] == {"int8"}
    assert greedy(folder, quantization=setting) == greedy(twin, quantization=setting)


@pytest.mark.parametrize(
    ("setting", "group", "error", "words"),
    [
        ({"experts": "int4"}, 128, ConfigError, "the model has no experts, only mixers and mlp; leave experts out"),
        (
            "int4",
            128,
            WeightFormatError,
            "64 columns do not divide into groups of 128; set quantization_group to 64 or 32",
        ),
        ({"mlp": "int4"}, 32, WeightFormatError, "96 columns are no multiple of 64; take fp8 or int8 or none"),
        ("fp8", 128, WeightFormatError, "do not begin at multiples of 128; take int8 or none"),
    ],
)
def test_quantization_that_a_model_cannot_have_is_refused_with_what_would_work(tmp_path, setting, group, error, words):
    save(tmp_path, DENSE, NARROW)
    with pytest.raises(error) as refusal:
        place_model(engine_config(tmp_path, quantization=setting, quantization_group=group), on_meta=True)
    assert words in str(refusal.value)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_dummy_weights_are_of_the_size_of_plain_ones(kind, tmp_path):
    save(tmp_path, MOE, WIDE)
    settings = {"load_format": "dummy", "quantization": kind}
    served = load_model(engine_config(tmp_path, **settings), progress=False)
    for _, weight in matrices_of(served.model):
        values = weight.dequantised(torch.float32)
        assert values.std() == pytest.approx(0.02, rel=0.05) and abs(values.mean()) < 0.002
    assert greedy(tmp_path, **settings) == greedy(tmp_path, **settings)
