"""YAML < environment < command line, and an error says key, value, source and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from given_settings import load, refused
from leyden.configs.kubernetes import injected_names
from leyden.configs.sources import SettingsError, load_settings


def test_each_source_overrides_the_one_before(tmp_path):
    text = "max_num_seqs: 2\nport: 2\nblock_size: 2"
    environ = {"LEYDEN_PORT": "3", "LEYDEN_BLOCK_SIZE": "3"}
    settings = load({"block_size": 4}, text, environ, folder=tmp_path)
    assert (settings.max_num_seqs, settings.port, settings.block_size) == (2, 3, 4)


def test_dashes_and_underscores_are_the_same_in_yaml(tmp_path):
    assert load(text="max-num-seqs: 3", folder=tmp_path).max_num_seqs == 3


def test_environment_holds_other_programs_variables_too():
    assert load(environ={"PATH": "/bin", "LEYDENX": "1", "leyden_port": "9", "LEYDEN_PORT": "9"}).port == 9


def test_environment_may_spell_every_kind_of_value():
    environ = {
        "LEYDEN_MAX_NUM_SEQS": "8",
        "LEYDEN_MEMORY_FRACTION": "0.5",
        "LEYDEN_GENERATION_DEFAULTS": "false",
        "LEYDEN_MODEL": "1234",
        "LEYDEN_API_KEY_FILE": "/run/keys",
    }
    settings = load(environ=environ)
    assert (settings.max_num_seqs, settings.memory_fraction, settings.generation_defaults) == (8, 0.5, False)
    assert (settings.model, settings.api_key_file) == ("1234", Path("/run/keys"))


@pytest.mark.parametrize("word", ["null", ""])
def test_environment_may_take_back_an_optional_value(tmp_path, word):
    settings = load(text="max_model_len: 100", environ={"LEYDEN_MAX_MODEL_LEN": word}, folder=tmp_path)
    assert settings.max_model_len is None


@pytest.mark.parametrize(
    ("text", "keys"), [("a", ["a"]), ("a,b", ["a", "b"]), (" a , b,", ["a", "b"]), ("null", ["null"])]
)
def test_api_keys_in_the_environment_are_a_list_with_commas(text, keys):
    assert load(environ={"LEYDEN_API_KEY": text}).api_key == keys


def test_a_wrong_setting_is_told_without_the_defaults_that_depend_on_it():
    assert len(refused("max_num_seqs", environ={"LEYDEN_MAX_NUM_SEQS": "0"}).splitlines()) == 1


@pytest.mark.parametrize("text", ["", " , ", ","])
def test_an_api_key_setting_without_a_key_is_refused(tmp_path, text):
    for source in ({"environ": {"LEYDEN_API_KEY": text}}, {"text": f'api_key: "{text}"', "folder": tmp_path}):
        refused("api_key", "no key", "unset it", **source)
    assert load({"api_key": ["k"]}, environ={"LEYDEN_API_KEY": text}).api_key == ["k"]


def test_an_empty_key_file_name_is_refused_and_null_unsets_it(tmp_path):
    refused("LEYDEN_API_KEY_FILE", "is empty", "unset it", environ={"LEYDEN_API_KEY_FILE": ""})
    environ = {"LEYDEN_API_KEY_FILE": "null"}
    assert load(text="api_key_file: keys", environ=environ, folder=tmp_path).api_key_file is None


def test_variables_of_a_kubernetes_service_called_leyden_are_no_settings():
    environ = {}
    for service in ("LEYDEN", "LEYDEN_GPU"):
        environ |= {
            f"{service}_PORT": "tcp://10.0.0.7:8000",
            f"{service}_SERVICE_HOST": "10.0.0.7",
            f"{service}_SERVICE_PORT": "8000",
            f"{service}_SERVICE_PORT_HTTP": "8000",
            f"{service}_PORT_8000_TCP": "tcp://10.0.0.7:8000",
            f"{service}_PORT_8000_TCP_PROTO": "tcp",
            f"{service}_PORT_8000_TCP_PORT": "8000",
            f"{service}_PORT_8000_TCP_ADDR": "10.0.0.7",
        }
    assert load(environ=environ) == load()
    assert injected_names(environ | {"PATH": "/bin", "LEYDEN_MODEL": "demo"}) == sorted(environ)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LEYDEN_PORT", "8000x"),
        ("LEYDEN_PORT_8000", "1"),
        ("LEYDEN_SERVICE", "x"),
        ("LEYDEN_PORTS", "tcp://10.0.0.7:1"),
    ],
)
def test_a_variable_that_kubernetes_does_not_add_is_a_wrong_setting(name, text):
    refused("environment", environ={name: text})


@pytest.mark.parametrize(("text", "keys"), [("[a, b]", ["a", "b"]), ("secret1", ["secret1"]), ("a, b", ["a", "b"])])
def test_api_keys_in_yaml_are_a_list_or_a_text(tmp_path, text, keys):
    assert load(text=f"api_key: {text}", folder=tmp_path).api_key == keys


def test_secrets_are_not_repeated_in_an_error(tmp_path):
    message = refused("api_key", text="api_key: {sk-very-secret: 1}", folder=tmp_path)
    assert "sk-very-secret" not in message
    message = refused("api_key", text="api_key: [[sk-very-secret]]", folder=tmp_path)
    assert "sk-very-secret" not in message


def test_unknown_key_is_named_with_its_source_and_a_suggestion(tmp_path):
    refused("'max_num_seq'", "settings.yaml", "did you mean 'max_num_seqs'?", text="max_num_seq: 3", folder=tmp_path)
    refused("'max_num_seq'", "environment", "'max_num_seqs'", environ={"LEYDEN_MAX_NUM_SEQ": "3"})
    refused("'max_num_seq'", "command line", "'max_num_seqs'", flags={"max_num_seq": 3})
    refused("'zzz'", "known settings", "max_num_seqs", "port", flags={"zzz": 1})


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("max_seqs", "max_num_seqs"),
        ("seqs", "max_num_seqs"),
        ("backend", "linear_backend"),
        ("MAX_NUM_SEQS", "max_num_seqs"),
        ("max_model_length", "max_model_len"),
        ("prot", "port"),
        ("gpu_memory_fraction", "memory_fraction"),
        ("served_name", "served_model_name"),
        ("body_bytes", "max_body_bytes"),
    ],
)
def test_the_setting_that_was_meant_is_suggested(word, meant):
    refused(f"did you mean {meant!r}?", flags={word: 1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port: [1,\nfoo", "line 2"),
        ("port: 1\n\tblock_size: 3", "line 2, column 1"),
        ("port 1\nblock_size: 3", "line 2"),
        ("a: \x01", "special characters are not allowed"),
        ("[" * 3000, "nests too deeply"),
    ],
)
def test_broken_yaml_is_told_in_one_line_with_its_place(tmp_path, text, words):
    message = refused("settings.yaml is not valid YAML", words, text=text, folder=tmp_path)
    assert "\n" not in message
    assert "<unicode string>" not in message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("linear_backend", "flash", "auto, minimax, seg_la, chunk, replay"),
        ("kernels", "cuda", "auto, torch, triton"),
        ("state_dtype", "int8", "float32, bfloat16, float16"),
        ("log_level", "loud", "debug, info, warning, error"),
        ("max_num_seqs", "0", "greater than or equal to 1"),
        ("max_num_seqs", "many", "integer"),
        ("port", "70000", "65535"),
        ("memory_fraction", "0", "greater than 0"),
        ("memory_fraction", "1.5", "less than or equal to 1"),
        ("cpu_memory_gb", "inf", "finite"),
        ("drain_seconds", "nan", "finite"),
        ("device", "tpu", "cuda"),
        ("metrics_prefix", "9 lives", "pattern"),
        ("block_size", "1.5", "integer"),
    ],
)
def test_bad_value_is_told_with_key_value_source_and_what_is_allowed(tmp_path, key, value, allowed):
    refused(key, value, "environment", allowed, environ={f"LEYDEN_{key.upper()}": value})
    refused(key, value, "settings.yaml", allowed, text=yaml.safe_dump({key: value}), folder=tmp_path)
    refused(key, value, "command line", allowed, flags={key: value})


@pytest.mark.parametrize("second", ["max_num_seqs", "max-num-seqs", "'max_num_seqs'"])
def test_a_key_given_twice_in_yaml_is_refused(tmp_path, second):
    text = f"max_num_seqs: 3\nport: 1\n{second}: 3"
    refused("settings.yaml gives max_num_seqs twice", "lines 1 and 3", text=text, folder=tmp_path)


def test_several_bad_values_are_told_together():
    message = refused("port", "block_size", flags={"port": -1, "block_size": 0})
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("text", ["- a\n- b", "just text", "5"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path, text):
    refused("settings.yaml", "mapping", text=text, folder=tmp_path)


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\t", "a: !!python/object/apply:os.system ['true']"])
def test_yaml_that_cannot_be_read_is_refused_and_never_run(tmp_path, text):
    refused("settings.yaml", "not valid YAML", text=text, folder=tmp_path)


def test_a_yaml_file_without_text_or_missing_is_refused(tmp_path):
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    for each in (path, tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(SettingsError, match=each.name):
            load_settings({}, each, {})


@pytest.mark.parametrize("text", ["", "# nothing", "null"])
def test_empty_yaml_is_no_setting(tmp_path, text):
    assert load(text=text, folder=tmp_path) == load()
