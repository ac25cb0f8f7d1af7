"""A checkpoint is complete or an error that names the tensor and the file; it is input, never code."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
import torch
from engines import answer, make_core
from leyden.kernels import load as load_kernels
from leyden.models.decoder import Decoder
from leyden.models.errors import CheckpointError
from leyden.models.families.registry import names_of, read_config
from leyden.models.layers.build import Build
from leyden.models.loading.checkpoint import resolve
from leyden.models.loading.files import INDEX_FILE
from leyden.models.loading.weights import load_weights
from leyden.models.mixers.backends import build_backends
from safetensors.torch import load_file, save_file
from tiny_models import greedy, save_minimax

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(config.json as text, tensors as transformers saves them, the model)."""
    folder = tmp_path_factory.mktemp("saved")
    model = save_minimax(folder, heads=2, layer_types=("linear_attention", "full_attention"))
    return (folder / "config.json").read_text(), load_file(folder / "model.safetensors"), model


@pytest.fixture
def folder(tmp_path, saved):
    (tmp_path / "config.json").write_text(saved[0])
    return tmp_path


@pytest.fixture
def tensors(saved):
    return dict(saved[1])


def write(folder, tensors, name="model.safetensors"):
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)


def load(folder) -> dict[str, torch.Tensor]:
    config = read_config(folder)
    kernels = load_kernels("torch")
    model = Decoder(config, Build(kernels, **CPU), build_backends("auto", config, kernels))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_weights(folder, model.targets(), names_of(config), ignored=model.ignored_names(), progress=False)
    parameters = dict(model.named_parameters())
    assert all(parameter.isfinite().all() for parameter in parameters.values()), "a part was never filled"
    return parameters


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def expected(folder, tensors):
    write(folder, tensors)
    loaded = load(folder)
    (folder / "model.safetensors").unlink()
    return loaded


def refused(folder, *words: str) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for word in words:
        assert word in str(error.value), str(error.value)
    return str(error.value)


def test_dummy_weights_need_a_config_alone_and_are_the_same_each_time(folder):
    answers = [
        answer(make_core(folder, load_format="dummy"), [1, 2, 3], max_tokens=8, ignore_eos=True).token_ids
        for _ in range(2)
    ]
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]
    refused(folder, "safetensors")


# -- spellings ------------------------------------------------------------------------------------------------


def test_one_file_fills_the_model_that_answers_like_transformers(folder, saved):
    write(folder, saved[1])
    prompt = [1, 2, 3, 4, 5]
    assert answer(make_core(folder), prompt, max_tokens=8).token_ids == greedy(saved[2], prompt, 8)


def fuse(tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Experts in one tensor each, as Hugging Face holds them in memory."""
    fused = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.{prefix}.experts"
        pairs = [torch.cat([tensors[f"{old}.{e}.w1.weight"], tensors[f"{old}.{e}.w3.weight"]]) for e in range(4)]
        fused[f"{new}.gate_up_proj"] = torch.stack(pairs)
        fused[f"{new}.down_proj"] = torch.stack([tensors[f"{old}.{e}.w2.weight"] for e in range(4)])
    return fused


SPELLINGS = {
    "mlp prefix": lambda t: {name.replace("block_sparse_moe", "mlp"): x for name, x in t.items()},
    "gate_proj for w1": lambda t: {
        name.replace(".w1.", ".gate_proj.").replace(".w3.", ".up_proj.").replace(".w2.", ".down_proj."): x
        for name, x in t.items()
    },
    "fused experts": lambda t: fuse(t, "mlp"),
    "fused experts, other prefix": lambda t: fuse(t, "block_sparse_moe"),
    "without model.": lambda t: {name.removeprefix("model."): x for name, x in t.items()},
    "with buffers that follow from the config": lambda t: (
        t
        | {
            "model.layers.0.self_attn.slope_rate": torch.zeros(2, 1, 1),
            "model.layers.0.self_attn.query_decay": torch.zeros(2, 32, 1),
            "model.layers.0.self_attn.key_decay": torch.zeros(2, 32, 1),
            "model.layers.0.self_attn.diagonal_decay": torch.zeros(1, 2, 32, 32),
            "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(8),
            "model.rotary_emb.inv_freq": torch.zeros(8),
        }
    ),
}


@pytest.mark.parametrize("respell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_fills_the_same_parameters(folder, tensors, expected, respell):
    write(folder, respell(tensors))
    assert equal(load(folder), expected)


def shard(folder, tensors, num=3, *, index: dict | None = None) -> dict[str, str]:
    weight_map = {}
    for i in range(num):
        name = f"model-{i + 1:05d}-of-{num:05d}.safetensors"
        part = dict(sorted(tensors.items())[i::num])
        write(folder, part, name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map} if index is None else index))
    return weight_map


def test_shards_with_an_index_fill_the_same_parameters_and_other_files_are_left_alone(folder, tensors, expected):
    shard(folder, tensors)
    write(folder, {"something": torch.zeros(1)}, "other.safetensors")
    assert equal(load(folder), expected)


def test_shards_without_an_index_fill_the_same_parameters(folder, tensors, expected):
    shard(folder, tensors)
    (folder / INDEX_FILE).unlink()
    assert equal(load(folder), expected)


STRANGERS = ["adapter_model.safetensors", "optimizer.safetensors", "consolidated-00001.safetensors"]


@pytest.mark.parametrize("form", ["one file", "shards", "shards without an index"])
def test_files_beside_the_weights_are_left_alone_and_said_to_be(folder, tensors, expected, caplog, form):
    if form == "one file":
        write(folder, tensors)
    else:
        shard(folder, tensors)
    if form == "shards without an index":
        (folder / INDEX_FILE).unlink()
    for name in STRANGERS:
        write(folder, {"something": torch.zeros(1)}, name)
    with caplog.at_level("INFO", "leyden.models"):
        assert equal(load(folder), expected)
    (told,) = [record.getMessage() for record in caplog.records]
    assert " not read, since " in told and told.endswith(": " + ", ".join(sorted(STRANGERS)))


def test_adapter_alone_is_no_model(folder):
    write(folder, {"something": torch.zeros(1)}, STRANGERS[0])
    refused(folder, STRANGERS[0], "merge an adapter into its model first")


def test_half_precision_files_fill_float32_parameters(folder, tensors):
    write(folder, {name: t.bfloat16() for name, t in tensors.items()})
    loaded = load(folder)
    assert torch.equal(loaded["embedding"], tensors["model.embed_tokens.weight"].bfloat16().float())


def test_tied_embeddings_need_no_head_and_ignore_one(folder, tensors):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, tensors)
    with_head = load(folder)
    del tensors["lm_head.weight"]
    write(folder, tensors)
    assert equal(load(folder), with_head)


# -- what is wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.norm.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.block_sparse_moe.experts.3.w3.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ],
)
def test_missing_tensor_is_named_with_its_shape(folder, tensors, name):
    shape = list(tensors.pop(name).shape)
    write(folder, tensors)
    refused(folder, f": {name} {shape}")


@pytest.mark.parametrize("respell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_missing_tensors_are_named_as_the_files_spell_the_others(folder, tensors, respell):
    present = respell(tensors)
    lost = [name for name in present if ".experts.3." in name and ".0." in name] or ["model.norm.weight"]
    for name in lost:
        del present[name]
    write(folder, present)
    told = refused(folder, "missing")
    assert all(f" {name} [" in told for name in lost), told


def test_many_missing_tensors_are_counted(folder, tensors):
    write(folder, {"model.norm.weight": tensors["model.norm.weight"]})
    refused(folder, "missing", "more")


@pytest.mark.parametrize("name", ["model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.bias", "extra"])
def test_unexpected_tensor_is_named_with_file_and_shape(folder, tensors, name):
    write(folder, tensors | {name: torch.zeros(3, 5)})
    refused(folder, "unexpected", name, "model.safetensors", "[3, 5]")


@pytest.mark.parametrize("shape", [(320, 31), (32,), (1, 320, 32), (321, 32), (0, 32)])
def test_wrong_shape_is_told_with_both_shapes_and_the_file(folder, tensors, shape):
    write(folder, tensors | {"lm_head.weight": torch.zeros(shape)})
    refused(folder, "lm_head.weight", "model.safetensors", str(list(shape)), "[320, 32]")


def test_fused_experts_of_a_wrong_shape_are_refused(folder, tensors):
    fused = fuse(tensors, "mlp")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write(folder, fused | {name: fused[name].transpose(1, 2)})
    refused(folder, name, "[4, 96, 32]")


def test_tensor_that_comes_twice_under_two_names_is_refused(folder, tensors):
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    other = "model.layers.0.mlp.experts.0.gate_proj.weight"
    write(folder, tensors | {other: tensors[name].clone()})
    refused(folder, "repeats", "model.safetensors")


def test_tensor_that_comes_twice_in_two_files_is_refused(folder, tensors):
    write(folder, tensors, "a.safetensors")
    write(folder, {"lm_head.weight": tensors["lm_head.weight"]}, "b.safetensors")
    refused(folder, "lm_head.weight", "repeats", "a.safetensors", "b.safetensors")


def test_experts_both_fused_and_apart_are_refused(folder, tensors):
    write(folder, tensors | fuse(tensors, "mlp"))
    refused(folder, "repeats")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_quantised_tensor_is_refused_where_no_config_tells_its_format(folder, tensors, dtype):
    write(folder, tensors | {"lm_head.weight": torch.zeros(320, 32).to(dtype)})
    refused(folder, "lm_head.weight", "[320, 32]", "quantised", "quantization_config")


# -- hostile or broken files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "model.bin", "a\\b.safetensors", "", 5, ["x"]],
)  # fmt: skip
def test_index_that_points_elsewhere_is_refused(folder, tensors, name):
    write(folder, tensors)
    write(folder.parent, tensors, "outside.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(folder, "not a plain .safetensors file name")
    (folder.parent / "outside.safetensors").unlink()


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "x"}])
def test_index_without_a_weight_map_is_refused(folder, tensors, index):
    shard(folder, tensors, index=index)
    refused(folder, INDEX_FILE, "weight_map")


def test_missing_shard_is_named(folder, tensors):
    lost = sorted(set(shard(folder, tensors).values()))[1]
    (folder / lost).unlink()
    refused(folder, lost, INDEX_FILE, "incomplete download")


def broken_files(tensors, folder):
    write(folder, tensors)
    whole = (folder / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    return {
        "empty": b"",
        "short": whole[:7],
        "header cut": whole[: header // 2],
        "data cut": whole[:-100],
        "garbage": b"\x93" * 4096,
        "huge header": struct.pack("<Q", 2**62) + whole[8:],
        "no json": struct.pack("<Q", 8) + b"notjson!" + b"\x00" * 64,
        "trailing bytes": whole + b"more",
    }


@pytest.mark.parametrize(
    "kind", ["empty", "short", "header cut", "data cut", "garbage", "huge header", "no json", "trailing bytes"]
)
def test_broken_file_is_a_checkpoint_error_that_names_it(folder, tensors, kind):
    data = broken_files(tensors, folder)[kind]
    (folder / "model.safetensors").write_bytes(data)
    told = refused(folder, "model.safetensors", "readable")
    is_cut = kind in ("empty", "short", "header cut", "data cut", "huge header")
    assert ("incomplete download" in told) == is_cut


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX_FILE])
def test_pointer_of_git_lfs_is_called_one(folder, tensors, name):
    write(folder, tensors)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    told = refused(folder, name, "git lfs pull")
    assert "\n" not in told


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl"])
def test_pickle_weights_are_refused_and_never_opened(folder, tmp_path, name):
    proof = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(proof), "w"))

    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, name, "pickle")
    assert not proof.exists()


def test_folder_without_weights_says_so(folder):
    refused(folder, "no .safetensors file")


def test_code_in_the_folder_is_never_imported(folder, tensors, tmp_path):
    proof = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    (folder / "configuration_evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    auto_map = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": auto_map, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, tensors)
    assert answer(make_core(folder), [1, 2], max_tokens=2).finish_reason == "length"
    assert not proof.exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere-at-all", "three/part/name", "word", ""])
def test_model_that_is_no_folder_and_no_hub_id_is_refused_without_asking_anyone(name):
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve(name)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("Got: ConnectError: no name\nAn error happened while trying to locate the files.", "ConnectError: no name;"),
        ("404 Client Error. (Request ID: x)\n\nRepository Not Found.", r"404 Client Error. \(Request ID: x\);"),
        ("Outgoing traffic has been disabled.", "Outgoing traffic has been disabled;"),
        ("", "OSError;"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_an_error_that_says_why_and_what_to_do(monkeypatch, told, reason):
    def refuse(*_args, **_kwargs):
        raise OSError(told)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=f"^cannot get 'owner/name' from the hub: {reason} .*give the folder"):
        resolve("owner/name")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_link_out_of_the_folder_is_refused_and_never_followed(folder, tensors, tmp_path_factory, name):
    write(folder, tensors)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret"
    if (folder / name).exists():
        (folder / name).rename(elsewhere)
    else:
        elsewhere.write_text("{}")
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder"):
        resolve(str(folder))


def test_a_link_inside_the_folder_is_followed(folder, tensors, expected):
    (folder / "parts").mkdir()
    write(folder, tensors, "parts/model.safetensors")
    (folder / "model.safetensors").symlink_to("parts/model.safetensors")
    assert equal(load(resolve(str(folder))), expected)


def test_a_hubs_cache_links_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert resolve(str(snapshot)) == snapshot


def test_what_is_no_regular_file_is_refused_instead_of_waited_for(folder):
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        resolve(str(folder))
