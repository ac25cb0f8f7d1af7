"""What `leyden info` and the start-up banner say."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise

import pytest
from engines import engine_config, make_core
from leyden.engine.errors import CheckpointError, ConfigError, WeightFormatError
from leyden.models.loading.checkpoint import DEMO_FOLDER
from leyden.server.commands.banner import banner
from leyden.server.commands.cli import main
from leyden.server.commands.info import describe_model
from safetensors.torch import load_file, save_file
from tiny_models import FULL, LINEAR, save_minimax


@pytest.mark.parametrize(("backend", "state"), [("seg_la", "4.1 KB"), ("replay", "12.3 KB")])
def test_the_state_counts_the_rings_beside_it(tmp_path, backend, state):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    told = describe_model(engine_config(tmp_path, linear_backend=backend), None)
    assert f"state per sequence {state} in float32" in told


def memory_line(text: str, label: str) -> str:
    return re.search(rf"^  {label} +(.*)$", text, re.MULTILINE)[1]


@pytest.mark.parametrize("settings", [{}, {"speculative_tokens": 3}], ids=str)
@pytest.mark.parametrize("backend", ["auto", "replay", "seg_la"])
def test_the_split_planned_from_the_config_is_the_one_the_engine_makes(tmp_path, backend, settings):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    settings = {"linear_backend": backend, "cpu_memory_gb": 0.001} | settings
    config = engine_config(tmp_path, **settings)
    core = make_core(tmp_path, **settings)
    told = banner(core.info, name="tiny", address="http://x", needs_key=False, can_chat=True)
    planned = describe_model(config, None)
    split = memory_line(planned, "planned split")
    assert split == memory_line(told, "memory")
    for word in ("weights", "state", "KV cache", "snapshots", "sampler tables", "free of"):
        assert word in split
    assert f"for {core.info.num_state_slots} sequences at once" in planned


@pytest.mark.parametrize("gigabytes", [0.004, 0.05])
def test_a_context_that_does_not_fit_is_planned_as_the_engine_clamps_it(tmp_path, gigabytes):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10_240_000}))
    settings = {"max_model_len": None, "cpu_memory_gb": gigabytes}
    info = make_core(tmp_path, **settings).info
    told = banner(info, name="tiny", address="http://x", needs_key=False, can_chat=True)
    planned = describe_model(engine_config(tmp_path, **settings), None)
    assert memory_line(planned, "planned split") == memory_line(told, "memory")
    assert memory_line(planned, "note") == memory_line(told, "note")
    assert f"clamped from 10240000 to {info.max_model_len}" in planned


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"snapshots": 3}, "3 snapshots of 4.1 KB, 12.3 KB"),
        ({"snapshots": 3, "state_dtype": "bfloat16"}, "3 snapshots of 2.05 KB, 6.14 KB"),
        ({"snapshots": 3, "snapshot_dtype": "float16"}, "3 snapshots of 2.05 KB, 6.14 KB"),
        (
            {"snapshots": 3, "host_snapshot_gb": 0.0001},
            "3 snapshots of 4.1 KB, 12.3 KB, and 24 on the host, 98.3 KB",
        ),
        ({"snapshots": 0, "host_snapshot_gb": 0.0001}, "no snapshots"),
        ({"prefix_cache": False, "snapshots": 3}, "no snapshots"),
    ],
    ids=str,
)
def test_the_prefix_cache_is_told_alike_before_and_after_the_start(tmp_path, settings, words):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    planned = describe_model(engine_config(tmp_path, **settings), None)
    told = banner(make_core(tmp_path, **settings).info, name="tiny", address="http://x", needs_key=False, can_chat=True)
    assert memory_line(planned, "prefix cache") == memory_line(told, "prefixes") == words
    assert memory_line(planned, "planned split") == memory_line(told, "memory")


def test_drafts_are_told_where_there_may_be_some_and_otherwise_not(tmp_path):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    settings = {"speculative_tokens": 5, "speculative_max_rows": 3}
    core = make_core(tmp_path, **settings)
    assert (core.info.speculative_tokens, core.info.speculative_max_rows) == (5, 3)
    on = [banner(core.info, name="tiny", address="http://x", needs_key=False, can_chat=True)]
    on.append(describe_model(engine_config(tmp_path, **settings), None))
    for text in on:
        assert memory_line(text, "drafts") == "up to 5 per sequence and step, while at most 3 sequences decode"
    info = make_core(tmp_path, speculative_max_rows=3).info
    assert (info.speculative_tokens, info.speculative_max_rows) == (0, 0)
    off = [banner(info, name="tiny", address="http://x", needs_key=False, can_chat=True)]
    off.append(describe_model(engine_config(tmp_path), None))
    assert not any("  drafts" in text for text in off)


def test_files_that_replace_the_checkpoints_own_are_told_and_no_others(tmp_path):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages }}")
    config = engine_config(tmp_path, tokenizer=DEMO_FOLDER, chat_template=template)
    with pytest.raises(CheckpointError, match=r"has 4096 tokens, the model 320; give the tokenizer of this model by"):
        describe_model(config, None)
    config = engine_config(tmp_path, tokenizer=tmp_path, chat_template=template)
    settings = {"name": "tiny", "address": "http://x", "needs_key": False, "can_chat": True}
    info = make_core(tmp_path).info
    for told in (describe_model(config, None), banner(info, **settings, config=config)):
        assert (memory_line(told, "tokenizer"), memory_line(told, "template")) == (str(tmp_path), str(template))
    for told in (describe_model(engine_config(tmp_path), None), banner(info, **settings)):
        assert "tokenizer" not in told and "template" not in told


def test_the_banner_names_the_backend_that_runs(tmp_path):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    told = banner(make_core(tmp_path).info, name="tiny", address="http://x", needs_key=False, can_chat=True)
    assert memory_line(told, "backend") == "replay (torch kernels) on cpu (CPU)"


def test_banner_of_a_gpu_names_the_measured_memory(tmp_path):
    save_minimax(tmp_path, heads=2, layer_types=(LINEAR,))
    info = make_core(tmp_path).info
    info.memory.workspace, info.memory.graphs, info.memory.other = 2_000_000, 3_000_000, 4_000_000
    told = banner(info, name="tiny", address="http://x", needs_key=False, can_chat=True)
    assert "2 MB workspace, 3 MB CUDA graphs, 4 MB other" in memory_line(told, "memory")


def test_the_banner_names_the_folder_of_sessions(tmp_path):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    config = engine_config(tmp_path, session_folder=tmp_path)
    info = make_core(tmp_path).info
    told = banner(info, name="tiny", address="http://x", needs_key=False, can_chat=True, config=config)
    assert memory_line(told, "sessions") == f"kept in {tmp_path}"
    assert "sessions  " not in banner(info, name="tiny", address="http://x", needs_key=False, can_chat=True)


def example(info, *, name="tiny", needs_key=False, can_chat=True):
    """The words of the command under a banner."""
    told = banner(info, name=name, address="http://localhost", needs_key=needs_key, can_chat=can_chat)
    return shlex.split(told.partition("\n\n")[2].replace("\\\n", ""))


@pytest.mark.parametrize("can_chat", [True, False])
@pytest.mark.parametrize("keys", [[], ["KEY"]], ids=str)
async def test_the_banners_command_is_one_that_the_server_answers(engine, tokenizer, make_client, keys, can_chat):
    tokenizer.has_chat_template = can_chat
    curl, flags, url, *rest = example(engine.info, needs_key=bool(keys), can_chat=can_chat)
    headers = [tuple(value.split(": ")) for flag, value in pairwise(rest) if flag == "-H"]
    response = await make_client(api_key=keys).post(url, content=rest[rest.index("-d") + 1], headers=headers)
    assert (curl, flags, response.status_code) == ("curl", "-sN", 200), response.text
    assert response.text.endswith("data: [DONE]\n\n")


def test_a_models_name_may_hold_quotes_and_the_banners_command_stays_whole(engine):
    name = """the "tiny" one's"""
    assert json.loads(example(engine.info, name=name)[-1])["model"] == name


def test_info_tells_clamped_settings_and_models_that_do_not_fit(tmp_path):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    config = engine_config(tmp_path, max_num_seqs=64, max_model_len=1024)
    assert "max_num_seqs clamped from 64 to" in describe_model(config, 0.001)
    told = describe_model(config, 0.0001)
    assert "does not fit in 100 KB (as given)" in told and "memory_fraction" in told
    assert "sequences that fit" in told


def test_a_context_that_the_engine_refuses_is_not_planned(tmp_path):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    with pytest.raises(ConfigError, match=r"max_model_len \(4096\) exceeds the checkpoint's context"):
        describe_model(engine_config(tmp_path, max_model_len=4096), None)


def damage(path, kind):
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "of another shape":
        tensors = load_file(path)
        save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"][:5].clone()}, path)
    else:
        path.rename(path.with_suffix(".bin"))


@pytest.mark.parametrize("kind", ["cut", "of another shape", "pickled"])
def test_weights_that_could_not_be_served_are_not_said_to_fit(tmp_path, capsys, kind):
    save_minimax(tmp_path, heads=2, layer_types=(LINEAR, FULL))
    config = engine_config(tmp_path)
    assert "sequences that fit" in describe_model(config, None)
    damage(tmp_path / "model.safetensors", kind)
    with pytest.raises(CheckpointError):
        describe_model(config, None)
    assert main(["info", str(tmp_path)]) == 2
    assert capsys.readouterr().out == ""


def test_a_config_alone_is_described(tmp_path):
    save_minimax(tmp_path, heads=2, layer_types=(LINEAR, FULL))
    (tmp_path / "model.safetensors").unlink()
    assert "sequences that fit" in describe_model(engine_config(tmp_path), None)


def test_bytes_of_quantised_weights_are_told_by_part(tmp_path):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    settings = {"quantization": {"experts": "int8", "mixers": "int4"}, "quantization_group": 64}
    with pytest.raises(WeightFormatError, match="48 columns do not divide into groups of 64; take fp8 or none"):
        describe_model(engine_config(tmp_path, **settings), None)
    settings = {"quantization": {"mixers": "int4"}, "quantization_group": 32}
    info = make_core(tmp_path, **settings).info
    # Of each mixer 64 x 64 numbers per projection: 8 (q, k, v, gate and out), and 2 + 1 + 1 / 2 + 1 / 2 of the softmax.
    numbers = 64 * (5 * 64 + 2 * 64 + 2 * 32)
    assert info.quantised_bytes == {"int4 mixers": numbers // 2 + 2 * numbers // 32}
    told = banner(info, name="tiny", address="http://x", needs_key=False, can_chat=True)
    planned = describe_model(engine_config(tmp_path, **settings), None)
    words = f"int4 mixers ({numbers * 9 / 16 / 1000:.3g} KB), other weights float32 ("
    assert words in memory_line(planned, "parameters") and words in memory_line(told, "numbers")
