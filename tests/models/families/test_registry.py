"""An architecture finds its family, and a folder's files make one spec. Reading them needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from leyden.models.errors import CheckpointError
from leyden.models.families.registry import FAMILIES, from_hf, names_of, read_config
from leyden.models.loading.checkpoint import DEMO_FOLDER

CONFIG = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "attn_type_list": [0, 1],
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": []}], ids=str)
def test_a_config_without_architectures_is_told_what_to_add(config):
    rest = {key: value for key, value in CONFIG.items() if key != "architectures"}
    with pytest.raises(
        CheckpointError, match=r"^config\.json: architectures is missing.* add it .*\[\"MiniMax"
    ) as error:
        from_hf(rest | config)
    assert all(name in str(error.value) for name in FAMILIES)


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], "LlamaForCausalLM", ["x", 5], [{"a": 1}], 7])
def test_unknown_architecture_is_refused_with_the_supported_ones(architectures):
    with pytest.raises(CheckpointError) as error:
        from_hf(CONFIG | {"architectures": architectures})
    assert all(name in str(error.value) for name in FAMILIES)


def test_a_known_architecture_after_an_unknown_one_is_taken():
    assert (
        from_hf(CONFIG | {"architectures": ["Custom", "MiniMaxM1ForCausalLM"]}).architecture == "MiniMaxM1ForCausalLM"
    )


def write(folder, config, generation=None):
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (None, None, ()),
        (None, {"eos_token_id": 200020}, (200020,)),
        (7, {"eos_token_id": [200020, 7]}, (7, 200020)),
        ([7, 8], {"eos_token_id": None}, (7, 8)),
        (0, {}, (0,)),
    ],
)
def test_stop_ids_are_joined_with_generation_config(tmp_path, own, generation, expected):
    write(tmp_path, CONFIG | {"eos_token_id": own}, generation)
    assert read_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\x00"])
def test_unreadable_json_is_a_checkpoint_error_that_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_bytes_that_are_no_text_are_a_checkpoint_error(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_config_is_a_checkpoint_error_that_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_reading_a_config_imports_no_torch():
    code = (
        "import sys; from pathlib import Path; from leyden.models.families.registry import names_of, read_config; "
        f"names_of(read_config(Path({str(DEMO_FOLDER)!r}))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_released_minimax_tensors_come_back_from_the_canonical_ones():
    names = names_of(read_config(DEMO_FOLDER))
    for stored in (
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.3.self_attn.qkv_proj.weight",
        "model.layers.3.block_sparse_moe.gate.weight",
        "model.layers.3.block_sparse_moe.experts.17.w2.weight",
    ):
        assert names.as_spelt(names.canonical(stored), []) == stored
