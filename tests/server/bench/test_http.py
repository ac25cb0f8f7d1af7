"""`leyden bench http` as a user runs it: worker processes, a table, one line of JSON."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from multiprocessing import Pipe

import httpx
import pytest
from leyden.benchmarks.load import host, workers
from leyden.benchmarks.load.client import Client
from leyden.benchmarks.load.errors import BenchError
from leyden.benchmarks.load.flags import Span
from leyden.benchmarks.load.load import Load, Workload
from leyden.benchmarks.load.output import finish
from leyden.benchmarks.load.target import Target
from leyden.server.commands.cli import main


@pytest.fixture
def bench(make_live, capsys):
    """bench(*flags) -> (exit code, output, errors, the JSON of the last line or None), against the scripted engine."""
    server = make_live()

    def run(*flags: str, url: str = server.url):
        code = main(["bench", "http", "--url", url, "--prompt-tokens", "3:6", "--max-tokens", "5", *flags])
        out, err = capsys.readouterr()
        return code, out, err, json.loads(out.splitlines()[-1]) if code == 0 else None

    return run


def test_streams_give_a_case_each_and_the_json_is_the_last_line_and_a_file(bench, engine, tmp_path):
    out = tmp_path / "report.json"
    flags = ("--concurrency", "1", "3", "--requests", "6", "--workers", "2", "--vocab-size", "200")
    code, text, _, report = bench(*flags, "--goodput", "e2e:60s", "--out", str(out))
    assert code == 0
    assert report == json.loads(out.read_text())
    assert [(case["concurrency"], case["requests"], case["errors"]) for case in report["cases"]] == [
        (1, 6, {}),
        (3, 6, {}),
    ]
    assert [case["client"]["workers"] for case in report["cases"]] == [1, 2]
    for case in report["cases"]:
        assert case["goodput"]["share"] == 1.0
        assert set(case["ttft_s"]) == {"mean", "p50", "p95", "p99", "max"}
        assert case["output_tokens_per_s"] == pytest.approx(6 * 5 / case["seconds"], rel=0.01)
    assert "time to first token" in text and "within e2e:60s: 100.0% of requests" in text
    prompts = [tuple(request.prompt_token_ids) for request in engine.requests]
    assert len(prompts) == 1 + 6 + 3 + 6, "a warm-up request per stream, and the requests"
    assert len(set(prompts)) == len(prompts), "no two prompts are the same"
    assert report["model"] == "tiny"


def test_a_background_load_is_in_no_latency_and_is_reported(bench, engine):
    flags = ("--rate", "40", "--requests", "20", "--vocab-size", "200", "--background-rate", "0", "50", "--warmup", "0")
    lengths = ("--background-prompt-tokens", "40", "--background-max-tokens", "1")
    code, text, _, report = bench(*flags, *lengths)
    assert code == 0
    alone, case = report["cases"]
    assert "background" not in alone
    assert case["name"] == "40 requests/s beside 50 requests/s of 40 tokens"
    assert (case["rate"], case["requests"], case["errors"]) == (40.0, 20, {})
    assert case["background"]["requests"] > 0
    assert case["background"]["errors"] == {}
    assert "in the background" in text
    lengths = [len(request.prompt_token_ids) for request in engine.requests]
    assert sum(length <= 6 for length in lengths) == 20 + 20
    assert lengths.count(40) >= case["background"]["requests"]


def test_background_prompts_of_no_given_length_fit_the_context_and_it_is_said(bench):
    flags = ("--rate", "40", "--requests", "20", "--vocab-size", "200", "--background-rate", "50", "--warmup", "0")
    code, _, err, report = bench(*flags)
    assert code == 0
    assert "background prompts have 127 tokens: the context is 128" in err
    assert report["cases"][0]["background"]["errors"] == {}


def test_latencies_beside_a_background_that_all_failed_are_no_measurement(bench, engine):
    flags = ("--rate", "40", "--requests", "20", "--vocab-size", "200", "--background-rate", "50", "--warmup", "0")
    engine.fail_after = 0
    engine.is_faulty = lambda request: len(request.prompt_token_ids) > 6
    code, _, err, _ = bench(*flags, "--background-prompt-tokens", "100")
    assert code == 1
    for words in (
        "background requests failed, the first with 'status 500'; the server says: ",
        "--background-prompt-tokens",
    ):
        assert words in err


def test_errors_are_counted_and_told(bench, engine):
    engine.fail_after = 2
    engine.is_faulty = lambda request: sum(request.prompt_token_ids) % 2 == 0
    _, text, _, report = bench("--concurrency", "2", "--requests", "8", "--warmup", "0", "--vocab-size", "200")
    (case,) = report["cases"]
    failed = case["errors"]["error in the stream"]
    assert 0 < failed < 8
    assert f"{failed} errors ({failed} error in the stream)" in text


def test_a_server_that_answers_nothing_fails_the_measurement(bench):
    code, _, err, _ = bench("--concurrency", "1", "--requests", "2", "--vocab-size", "5000000")
    assert code == 1
    assert "no request was answered" in err and "status 400" in err
    assert "the server says: " in err and "token ids in [0, " in err


@pytest.mark.parametrize("kind", ["", "background-"])
@pytest.mark.parametrize("url_and_model", [(), ("--model", "tiny")], ids=["first", "named"])
def test_requests_that_exceed_the_context_are_refused_before_they_are_sent(bench, engine, kind, url_and_model):
    lengths = (f"--{kind}prompt-tokens", "9:125", f"--{kind}max-tokens", "4")
    code, _, err, _ = bench("--rate", "9", "--background-rate", "1", *lengths, *url_and_model)
    assert code == 2
    assert f"--{kind}prompt-tokens 9:125 and --{kind}max-tokens 4 are up to 129 tokens" in err and "128" in err
    assert engine.requests == []


def test_a_context_that_is_filled_to_the_last_token_is_measured(bench):
    flags = ("--concurrency", "1", "--requests", "1", "--warmup", "0", "--vocab-size", "200")
    assert bench(*flags, "--prompt-tokens", "123")[0] == 0


def test_no_server_is_said_with_the_remedy(bench):
    code, _, err, _ = bench(url="http://127.0.0.1:1")
    assert code == 1
    assert "no server at http://127.0.0.1:1" in err and "--url" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--concurency", "3"], ["--concurency", "did you mean --concurrency?"]),
        (["--concurrency", "0"], ["--concurrency", "at least 1"]),
        (["--concurrency", "1", "--rate", "2"], ["--rate", "not allowed with argument --concurrency"]),
        (["--background-rate", "-1"], ["--background-rate"]),
        (["--max-tokens", "9:3"], ["--max-tokens", "MIN:MAX"]),
        (["--goodput", "speed:1ms"], ["--goodput", "ttft, itl, tpot, e2e"]),
        (["--picture", "x.gif"], ["--picture", ".png or .svg"]),
        (["--url", "ftp://x"], ["ftp://x"]),
        (["--serve-args", "--host '"], ["--serve-args", "No closing quotation"]),
        (["--out", "/nowhere/x.json"], ["--out", "no folder /nowhere"]),
        (["--out", "/"], ["--out /", "cannot be written"]),
        (["--endpoint", "chat", "--prompt", "ids"], ["--prompt ids", "--endpoint completions"]),
    ],
)
def test_a_wrong_flag_is_named(flags, words, capsys):
    try:
        code = main(["bench", "http", *flags])
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code in (1, 2)
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<html>welcome</html>", "no list of models"),
        (b'{"data": [{"name": "x"}]}', "no list of models"),
        (b"\xff\xfe", "no list of models"),
        (b'{"data": []}', "lists no model; name one with --model"),
    ],
)
def test_a_server_without_a_list_of_models_is_said(make_live, capsys, answer, words):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    assert main(["bench", "http", "--url", make_live(app).url]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("outcome", [httpx.ReadTimeout("timed out"), 503], ids=["timeout", "503"])
def test_a_server_that_starts_unhealthy_is_said(monkeypatch, outcome):
    def get(url, **options):
        if isinstance(outcome, Exception):
            raise outcome
        return httpx.Response(outcome, request=httpx.Request("GET", url))

    monkeypatch.setattr(host.httpx, "get", get)
    with pytest.raises(BenchError, match=r"http://x started but is not healthy .*(timed out|503)"):
        host._require_health("http://x")


def test_a_server_that_does_not_stop_is_killed(monkeypatch, capsys):
    monkeypatch.setattr(host, "STOP_SECONDS", 0.1)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    host._stop(process)
    assert process.returncode == -9
    assert "is killed" in capsys.readouterr().err


async def test_an_endless_share_that_ends_by_itself_waits_for_nobody():
    workload = Workload("completions", "m", "ids", Span(3, 3), Span(1, 1), 50, 0.0, True, False, seed=1)
    share = workers.Share(Target("127.0.0.1", 1, False, "", None), workload, Load(0, rate=1.0), 1.0, is_endless=True)
    client = Client(share.target, "completions", ignore_eos=True, timeout=1.0)
    mine, theirs = Pipe()
    with mine, theirs:
        assert await asyncio.wait_for(workers.run_until_told(share, client, 0.0, mine), 5.0) == []


def test_the_json_is_printed_even_if_the_file_cannot_be_written(capsys, tmp_path):
    with pytest.raises(FileNotFoundError):
        finish({"x": 1}, tmp_path / "gone" / "x.json")
    assert json.loads(capsys.readouterr().out) == {"x": 1}


def test_a_worker_that_dies_ends_the_measurement(bench, monkeypatch):
    monkeypatch.setattr(workers, "work", _die)
    code, _, err, _ = bench("--concurrency", "1")
    assert code == 1
    assert "a worker process died" in err


def _die(pipe) -> None:
    pipe.recv()
    raise SystemExit(3)


def test_help_tells_every_flag_and_imports_no_torch(capsys):
    with pytest.raises(SystemExit) as done:
        main(["bench", "http", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--url", "--concurrency", "--rate", "--background-rate", "--goodput", "--picture", "--serve-args"):
        assert flag in text
