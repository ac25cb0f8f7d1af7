"""The benchmarks that start what they measure, on tiny models, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from leyden.server.commands.cli import main as leyden
from tiny_models import FULL, LINEAR, save_minimax

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> int:
    return leyden(["bench", *arguments])


def test_offline_measures_every_case_and_ends_in_json(tmp_path, capsys):
    save_minimax(tmp_path, layer_types=(LINEAR, FULL))
    engine = ("linear_backend=replay", "cpu_memory_gb=0.1", "max_num_batched_tokens=16", "device=cpu")
    cases = ("1x5x3", "4x9x2")
    assert run("offline", "--model", str(tmp_path), "--cases", *cases, "--engine", *engine) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["linear_backend"] == "replay"
    assert [(c["requests"], c["prompt"], c["answer"]) for c in report["cases"]] == [(1, 5, 3), (4, 9, 2)]
    for case in report["cases"]:
        assert case["answer_tokens_per_s"] == pytest.approx(
            case["requests"] * case["answer"] / case["seconds"], rel=0.01
        )


@pytest.mark.parametrize("case", ["0x1x1", "8x8", "8 x 8 x 8", "1x-2x3"])
def test_a_malformed_case_is_refused(capsys, case):
    with pytest.raises(SystemExit):
        run("offline", "--cases", case)
    assert "REQUESTSxPROMPTxANSWER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters", "state"), [("dense", "7.108B", "73.4 MB"), ("moe", "13.89B", "27.5 MB")]
)
def test_the_configurations_to_measure_are_what_they_say(name, parameters, state):
    from leyden.configs.schema import EngineConfig
    from leyden.server.commands.info import describe_model

    told = describe_model(EngineConfig(model=str(ROOT / "benchmarks" / "configs" / name), device="cpu"), None)
    assert f"parameters         {parameters}, " in told
    assert f"state per sequence {state} in float32" in told


def test_repeats_report_the_median_run_and_the_host_time_of_each_step(tmp_path, capsys):
    save_minimax(tmp_path, layer_types=(LINEAR, FULL))
    flags = (
        "--model",
        str(tmp_path),
        "--cases",
        "2x5x4",
        "--repeats",
        "3",
        "--engine",
        "cpu_memory_gb=0.1",
        "device=cpu",
    )
    assert run("offline", *flags) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (case,) = report["cases"]
    assert case["seconds"] == sorted(case["all_seconds"])[1]
    assert case["engine_steps"] == 4
    assert case["decode_steps"] == 3 and case["host_ms_per_decode_step"] > 0
    assert report["engine_startup_s"] > 0
    assert report["memory_bytes"]["weights"] > 0 and report["memory_bytes"]["kv"] > 0


def test_a_profile_of_each_batch_and_of_a_prompt_step_goes_into_the_folder(tmp_path, capsys):
    save_minimax(tmp_path / "model", layer_types=(LINEAR, FULL))
    engine = ("--engine", "cpu_memory_gb=0.1", "device=cpu", "max_num_batched_tokens=16")
    flags = ("--model", str(tmp_path / "model"), "--cases", "2x5x4", "4x5x4", "2x7x1", "--profile", str(tmp_path / "p"))
    assert run("offline", *flags, *engine) == 0
    text = capsys.readouterr().out
    report = json.loads(text.splitlines()[-1])
    assert [profile["name"] for profile in report["profiles"]] == [
        "decode, 2 rows after 5", "decode, 4 rows after 5", "prefill, 16 tokens of 3 prompts"
    ]  # fmt: skip
    names = {path.name for path in (tmp_path / "p").iterdir()}
    assert names == {
        f"{step}.{kind}"
        for step in ("decode-2x5", "decode-4x5", "prefill-16")
        for kind in ("trace.json.gz", "table.json")
    }
    assert "rms_norm" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cases", "1x2x3", "--engine", "max_num_seq=3"], ["max_num_seq", "did you mean 'max_num_seqs'?"]),
        (["--cases", "1x2x3", "--engine", "max_num_seqs"], ["--engine", "KEY=VALUE"]),
        (["--repeats", "0"], ["--repeats", "at least 1"]),
        (["--profil"], ["--profil", "did you mean --profile?"]),
        (["--model", "/nowhere"], ["/nowhere"]),
        (["--engine", "model=x"], ["--engine", "model has a flag of its own: --model x"]),
        (["--engine", "max_num_batched_tokens=abc"], ["max_num_batched_tokens", "'abc'", "integer"]),
        (["--cases", "1x8x8", "64x4096x1"], ["--cases 64x4096x1", "4,097", "the context is 2,048"]),
        (["--cases", "1x8x8", "--engine", "max_model_len=15"], ["--cases 1x8x8", "the context is 15"]),
        (["--engine", "max_model_len=15"], ["--cases", "the context is 15"]),
    ],
)
def test_a_wrong_flag_or_setting_is_named(capsys, flags, words):
    try:
        code = run("offline", *flags)
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2
    assert all(word in err for word in words), err


@pytest.mark.parametrize("is_profiled", [False, True])
def test_the_default_cases_that_exceed_the_context_are_left_out_and_said(capsys, is_profiled):
    from leyden.benchmarks.load.flags import OFFLINE_CASES
    from leyden.benchmarks.load.offline import choose

    cases, settings = choose({"model": "demo"}, None, {}, is_profiled=is_profiled)
    assert [str(case) for case in cases] == OFFLINE_CASES.split()[:-1]
    assert capsys.readouterr().err == "left out 64x4096x1: the context is 2,048\n"
    assert settings["max_num_seqs"] == 256
    assert max(case.prompt + case.answer for case in cases) <= settings["max_model_len"] <= 2048


@pytest.mark.parametrize(("engine", "is_on"), [({}, False), ({"prefix_cache": "true"}, True)], ids=["unless", "asked"])
def test_the_prefix_cache_is_off_unless_asked_for(engine, is_on):
    from leyden.benchmarks.load.flags import OfflineCase
    from leyden.benchmarks.load.offline import choose
    from leyden.configs.sources import load_settings

    _, settings = choose({"model": "demo"}, [OfflineCase(1, 8, 8)], engine, is_profiled=False)
    assert load_settings(settings).engine().prefix_cache is is_on


@pytest.mark.parametrize("flag", ["--out", "--profile"])
def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path, capsys, flag):
    (tmp_path / "file").touch()
    assert run("offline", flag, str(tmp_path / "file" / "x")) == 2
    assert f"{flag} {tmp_path / 'file' / 'x'}" in capsys.readouterr().err


def test_http_starts_its_own_server_measures_it_and_stops_it(monkeypatch, tmp_path, capfd):
    save_minimax(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    lengths = ("--prompt-tokens", "4", "--max-tokens", "4")
    flags = (
        "--model",
        str(tmp_path),
        "--concurrency",
        "2",
        "--requests",
        "4",
        "--serve-args",
        "--max-num-seqs 3",
        *lengths,
    )
    assert run("http", *flags) == 0
    out, err = capfd.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert report["start_to_ready_s"] > 0
    assert report["cases"][0]["errors"] == {}
    assert "3 sequences at once" in err
    with pytest.raises(httpx.ConnectError):
        httpx.get(report["url"])
