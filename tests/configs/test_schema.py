"""Defaults, bounds and dependencies of the fields, and the presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from given_settings import load, refused
from leyden.configs.schema import EngineConfig, ServerConfig, Settings
from leyden.configs.sources import load_settings

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_defaults_are_valid_without_any_source():
    settings = load()
    assert (settings.model, settings.port, settings.linear_backend) == ("demo", 8000, "auto")


@pytest.mark.parametrize(("num_seqs", "num_waiting"), [(1, 1), (64, 1024), (512, 4096)])
def test_a_full_queue_is_met_before_max_connections_by_default(num_seqs, num_waiting):
    environ = {"LEYDEN_MAX_NUM_SEQS": f"{num_seqs}", "LEYDEN_MAX_WAITING": f"{num_waiting}"}
    assert load(environ=environ).max_connections > num_seqs + num_waiting
    assert load({"max_connections": "7"}, environ=environ).max_connections == 7


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_host_is_refused(tmp_path, text):
    refused("host = ", "environment", "127.0.0.1", "0.0.0.0 for all", environ={"LEYDEN_HOST": text})
    refused("host = ", "command line", "127.0.0.1", flags={"host": text})
    refused("host = ", "settings.yaml", text=f"host: '{text}'", folder=tmp_path)


def test_an_empty_served_model_name_is_refused_as_a_flag_and_unset_by_the_environment():
    refused("served_model_name = ''", flags={"served_model_name": ""})
    assert load_settings({}, None, {"LEYDEN_SERVED_MODEL_NAME": ""}).served_model_name is None


@pytest.mark.parametrize("word", ["yes", "off", "true"])
@pytest.mark.parametrize(
    "key", ["max_num_seqs", "speculative_tokens", "max_model_len", "cpu_memory_gb", "port", "drain_seconds"]
)
def test_a_number_refuses_yes_and_no(tmp_path, key, word):
    value = repr(yaml.safe_load(word))
    refused(f"{key} = {value}", "settings.yaml", "must be a number", text=f"{key}: {word}", folder=tmp_path)


def test_a_switch_takes_yes_and_no(tmp_path):
    settings = load(text="prefix_cache: no\nasync_scheduling: yes", folder=tmp_path)
    assert (settings.prefix_cache, settings.async_scheduling) == (False, True)


@pytest.mark.parametrize(("name", "value"), [("prefix_cache", False), ("snapshots", 0)])
def test_a_session_folder_without_snapshots_is_refused(name, value):
    settings = {name: value, "session_folder": "sessions"}
    message = refused("session_folder", f"{name} = {value}", f"leave {name} out", flags=settings)
    assert len(message.splitlines()) == 1
    assert load({name: value}).session_folder is None
    assert load({"session_folder": "sessions", "snapshots": 1}).snapshots == 1


def test_budget_must_fit_every_row():
    refused("max_num_batched_tokens", "max_num_seqs (100)", flags={"max_num_seqs": 100, "max_num_batched_tokens": 99})
    refused("max_num_batched_tokens", "max_num_seqs (4096)", "default", flags={"max_num_seqs": 4096})
    assert load({"max_num_seqs": 100, "max_num_batched_tokens": 100}).max_num_seqs == 100


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads(preset):
    settings = load_settings({}, preset, {})
    assert settings.model == yaml.safe_load(preset.read_text())["model"]
    assert preset.read_text().startswith("#"), "a preset says what it is for"


def test_there_are_presets():
    assert "demo" in [path.stem for path in PRESETS]


def test_engine_settings_hold_no_server_setting():
    engine = load({"port": 1, "block_size": 8}).engine()
    assert type(engine) is EngineConfig and engine.block_size == 8
    assert not set(EngineConfig.model_fields) & set(ServerConfig.model_fields)


def test_engine_settings_cross_to_another_process_unchanged():
    engine = load({"seed": 2**60, "max_model_len": 77, "memory_fraction": 0.1}).engine()
    assert EngineConfig.model_validate_json(engine.model_dump_json()) == engine


def test_settings_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        load().port = 1


def test_every_setting_has_a_help_text():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_engine_settings_keep_which_fields_were_set():
    assert load_settings({"max_num_seqs": "8", "port": "1"}, environ={}).engine().model_fields_set == {"max_num_seqs"}


ALIKE = {"experts": "int8", "mixers": "int8", "mlp": "int8"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("int8", ALIKE),
        ("none", {}),
        (None, {}),
        ('{"experts": "int4", "mixers": "none"}', {"experts": "int4", "mixers": "none"}),
        ({"mlp": "fp8"}, {"mlp": "fp8"}),
    ],
)
def test_quantization_is_a_word_for_all_parts_or_an_object_by_part(value, expected, tmp_path):
    assert load({"quantization": value}).quantization == expected
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"quantization": value}))
    assert load_settings({}, path, {}).quantization == expected
    if isinstance(value, str):
        assert load_settings({}, environ={"LEYDEN_QUANTIZATION": value}).quantization == expected
    assert load({"quantization": value}).quantizes_all_alike == (value == "int8")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("int3", "quantization = 'int3' (command line): must be none, fp8, int8 or int4, or an object by part"),
        ("gptq", "a checkpoint's own format is read without this setting"),
        ('{"experts": ', "is not valid JSON"),
        ({"experts": "int3"}, "quantization.experts = 'int3' (command line): Input should be 'none', 'fp8'"),
        ({"heads": "int8"}, "quantization = 'heads' (command line): Input should be 'experts', 'mixers' or 'mlp'"),
    ],
)
def test_wrong_quantization_is_refused_with_what_is_allowed(value, words):
    refused(words, flags={"quantization": value})


def test_quantization_groups_are_those_that_kernels_have():
    assert load({"quantization_group": "64"}).quantization_group == 64
    refused("quantization_group = 48", "must be 128, 64 or 32", flags={"quantization_group": 48})
