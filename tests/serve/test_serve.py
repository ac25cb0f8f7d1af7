"""The whole server, from a process start to a client's socket."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
from tiny_models import byte_tokenizer, random_prompt

LONG = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}


def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def async_client(served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def exists(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def group_exists(group: int) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def test_official_client_streaming_equals_not_streaming(shared):
    request = {"model": "tiny", "prompt": "Hello", "max_tokens": 40, "temperature": 0}
    whole = client(shared).completions.create(**request)
    chunks = list(client(shared).completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 40


def test_official_client_chat(shared):
    messages = [{"role": "user", "content": "hi"}]
    answer = client(shared).chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=7)
    again = client(shared).chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=7)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == again.choices[0].message.content
    assert client(shared).models.list().data[0].id == "tiny"


async def test_64_concurrent_streams_each_as_if_alone(shared):
    prompts = [random_prompt(1 + i % 40, seed=i) for i in range(64)]

    async def stream(prompt: list[int]) -> str:
        parts = await async_client(shared).completions.create(
            model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True
        )
        return "".join([part.choices[0].text async for part in parts])

    together = await asyncio.gather(*[stream(prompt) for prompt in prompts])
    alone = [await stream(prompt) for prompt in prompts[:8]]
    assert together[:8] == alone


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "not streaming"])
def test_disconnect_frees_slot_and_blocks(shared, stream):
    body = {"model": "tiny", "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": stream}
    with httpx.Client(base_url=shared.url, timeout=httpx.Timeout(30, read=0.3)) as http:
        try:
            with http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_raw())
        except httpx.ReadTimeout:
            assert not stream
    shared.wait_idle()


def test_prompt_longer_than_the_context_is_a_400_that_says_so(shared):
    with pytest.raises(openai.BadRequestError) as error:
        client(shared).completions.create(model="tiny", prompt="y" * 2000)
    assert error.value.code == "context_length_exceeded"
    assert "2000" in error.value.message
    assert "1024" in error.value.message


async def test_full_queue_is_a_429_with_retry_after_and_the_others_finish(serve):
    served = serve("--max-num-seqs", "2", "--max-waiting", "3")
    ai = async_client(served)

    async def ask() -> str:
        try:
            answer = await ai.completions.create(
                model="tiny", prompt="x", max_tokens=300, extra_body={"ignore_eos": True}
            )
        except openai.RateLimitError as error:
            return f"refused, retry after {error.response.headers['retry-after']}"
        assert answer.usage.completion_tokens == 300
        return "served"

    outcomes = await asyncio.gather(*[ask() for _ in range(20)])
    assert "refused, retry after 1" in outcomes
    assert outcomes.count("served") >= 5
    served.wait_idle()


async def test_killed_engine_fails_open_streams_and_ends_the_server(serve):
    served = serve()
    stream = await async_client(served).completions.create(model="tiny", prompt="x", stream=True, **LONG)
    await anext(aiter(stream))
    os.kill(served.engine_pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine"):
        async for _ in stream:
            pass
    assert served.process.wait(timeout=10) == 1


async def test_hung_engine_fails_open_streams_turns_health_red_and_ends_the_server(serve, capfd):
    served = serve("--step-timeout", "3")
    engine = served.engine_pid
    stream = await async_client(served).completions.create(model="tiny", prompt="x", stream=True, **LONG)
    await anext(aiter(stream))
    os.kill(engine, signal.SIGSTOP)
    with pytest.raises(openai.APIError, match="engine"):
        async for _ in stream:
            pass
    with suppress(httpx.ConnectError):  # it may have closed its port already
        assert (await asyncio.to_thread(httpx.get, f"{served.url}/health")).status_code == 503
    assert await asyncio.to_thread(served.process.wait, 20) == 1
    assert not exists(engine)
    assert "step_timeout" in capfd.readouterr().err


async def test_sigterm_finishes_open_streams_refuses_new_ones_and_exits_0(serve):
    served = serve()
    engine = served.engine_pid
    stream = await async_client(served).completions.create(model="tiny", prompt="x", stream=True, **LONG)
    await anext(aiter(stream))
    served.process.send_signal(signal.SIGTERM)
    served.wait_for(lambda: httpx.get(f"{served.url}/health").status_code == 503)
    async with httpx.AsyncClient() as http:
        refused = await http.post(f"{served.url}/v1/completions", json={"model": "tiny", "prompt": "y"})
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    reasons = [chunk.choices[0].finish_reason async for chunk in stream]
    assert reasons[-1] == "length"
    assert await asyncio.to_thread(served.process.wait, 30) == 0
    assert not exists(engine)


def test_log_has_a_line_when_the_server_is_ready_drains_and_ends(serve, capfd):
    served = serve("--log-format", "json")
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=30) == 0
    told = [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines()]
    assert told[-3:] == [
        f"ready: tiny is served at {served.url}",
        "draining after SIGTERM; open requests: 0, which may finish within 30 s (a second signal stops at once)",
        "ended: SIGTERM, and every request was finished; exit code 0",
    ]


async def test_second_signal_does_not_wait(serve):
    served = serve("--drain-seconds", "600")
    engine = served.engine_pid
    stream = await async_client(served).completions.create(model="tiny", prompt="x", stream=True, **LONG)
    await anext(aiter(stream))
    served.process.send_signal(signal.SIGINT)
    served.wait_for(lambda: httpx.get(f"{served.url}/health").status_code == 503)
    served.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="the server stopped before the answer was complete"):
        async for _ in stream:
            pass
    assert await asyncio.to_thread(served.process.wait, 20) == 0
    assert not exists(engine)


async def test_requests_open_at_the_end_of_the_drain_are_told_so(serve, capfd):
    served = serve("--drain-seconds", "0.5")
    engine = served.engine_pid
    body = {"model": "tiny", "prompt": "x", "max_tokens": 900, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=served.url, timeout=20) as http:
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            lines = aiter(stream.aiter_lines())
            await anext(lines)
            os.kill(engine, signal.SIGSTOP)  # nothing comes any more, however long the drain
            whole = asyncio.create_task(http.post("/v1/completions", json=body))
            await asyncio.sleep(0.2)
            served.process.send_signal(signal.SIGTERM)
            last = [line async for line in lines if line][-2:]
        answer = await whole
    os.kill(engine, signal.SIGCONT)
    assert await asyncio.to_thread(served.process.wait, 20) == 0
    error = json.loads(last[0].removeprefix("data: "))["error"]
    assert (error["type"], last[1]) == ("overloaded", "data: [DONE]")
    assert answer.status_code == 503 and "retry-after" in answer.headers, answer.text
    for message in (error["message"], answer.json()["error"]["message"]):
        assert message == "the server stopped before the answer was complete (drain_seconds = 0.5)"
    log = capfd.readouterr().err
    assert "requests cut off: 2" in log and "Traceback" not in log and "ERROR" not in log, log


def test_a_body_that_is_still_to_come_when_the_drain_is_over_is_answered_too(serve, capfd):
    served = serve("--drain-seconds", "0.1")
    host, port = served.url.removeprefix("http://").rsplit(":", 1)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + b"Content-Length: 99\r\n\r\n{")
        time.sleep(0.2)
        served.process.send_signal(signal.SIGTERM)
        answer = b""
        while data := connection.recv(4096):
            answer += data
    assert served.process.wait(timeout=20) == 0
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'{"error":{"message":"the server stopped before it could answer","type":"overloaded"' in answer
    assert "Traceback" not in capfd.readouterr().err


def test_health_is_503_while_the_model_loads(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "leyden.server.commands.cli", "serve", str(checkpoint), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    seen = []
    deadline = time.monotonic() + 60
    while seen[-1:] != [200]:
        assert time.monotonic() < deadline and process.poll() is None
        with suppress(httpx.TransportError):
            seen.append(httpx.get(f"http://127.0.0.1:{port}/health").status_code)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert set(seen[:-1]) == {503}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_the_model_loads_leaves_nothing_behind(checkpoint, number):
    command = [sys.executable, "-P", "-m", "leyden.server.commands.cli", "serve", str(checkpoint), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    time.sleep(1.5)
    os.killpg(process.pid, number)
    assert process.wait(timeout=30) in (128 + number, -number)
    deadline = time.monotonic() + 20
    while group_exists(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_settings_reach_the_engine_from_yaml_environment_and_flags(serve, tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("max-num-seqs: 3\nlinear_backend: seg_la\nstate_dtype: bfloat16\n")
    served = serve("--config", str(config), "--linear-backend", "minimax", env={"LEYDEN_MAX_NUM_SEQS": "5"})
    metrics = httpx.get(f"{served.url}/metrics").text
    assert 'linear_backend="minimax"' in metrics
    assert 'state_dtype="bfloat16"' in metrics
    assert served.gauge("state_slots_total") == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--max-num-seq", "3"], ["--max-num-seq", "did you mean --max-num-seqs?"]),
        (["serve", "--linear-backend", "x"], ["linear_backend", "'x'", "auto, minimax, seg_la, chunk, replay"]),
        (["serve", "--max-num-seqs", "0"], ["max_num_seqs", "greater than or equal to 1"]),
        (["serve", "/nowhere"], ["/nowhere"]),
        (["serve", "--config", "/no.yaml"], ["/no.yaml"]),
        (["sevre"], ["sevre"]),
    ],
    ids=["flag", "choice", "bound", "model", "file", "command"],
)
def test_wrong_command_line_exits_2_and_names_the_fault(arguments, words):
    command = [sys.executable, "-P", "-m", "leyden.server.commands.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_memory_that_is_not_there_exits_2_and_names_the_settings(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "endless")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1 << 27}
    (folder / "config.json").write_text(json.dumps(config))
    settings = ["--cpu-memory-gb", "1e9", "--max-num-seqs", "2048", "--block-size", "1024", "--port", "0"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "leyden.server.commands.cli",
        "serve",
        str(folder),
        "--device",
        "cpu",
        *settings,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    for word in ("out of memory", "max_num_seqs", "cpu_memory_gb"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_gone_leaves_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "leyden.server.commands.cli", "info", "demo"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_port_in_use_is_said_before_the_model_is_loaded(shared, checkpoint):
    port = shared.url.rsplit(":", 1)[1]
    command = [sys.executable, "-P", "-m", "leyden.server.commands.cli", "serve", str(checkpoint), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr


def test_json_logs_are_json_alone_in_both_processes(checkpoint, tmp_path):
    command = [sys.executable, "-P", "-m", "leyden.server.commands.cli", "serve", str(checkpoint), "--port", "0"]
    log = tmp_path / "log"
    settings = ["--log-format", "json", "--log-level", "debug", "--stats-interval", "0.1"]
    with log.open("w") as stderr:
        process = subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, stderr=stderr, text=True)
        address = next(line.split()[1] for line in process.stdout if line.strip().startswith("address"))
        prompt = {"prompt": "my secret diary", "max_tokens": 400, "ignore_eos": True}
        httpx.post(f"{address}/v1/completions", json=prompt, headers={"x-request-id": "r-7"}, timeout=30)
        os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()), signal.SIGKILL)
        assert process.wait(timeout=10) == 1
        process.stdout.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(line) for line in lines))
    assert any("generation" in line["message"] for line in lines)
    assert lines[-1]["level"] == "error"
    assert re.fullmatch(r"ended: the engine process .* by signal 9; exit code 1", lines[-1]["message"])
    assert "secret" not in log.read_text()


def test_a_checkpoint_in_which_no_token_ends_an_answer_is_served(checkpoint, tmp_path, serve):
    pytest.importorskip("llguidance")
    folder = shutil.copytree(checkpoint, tmp_path / "endless")
    byte_tokenizer(control=()).save_pretrained(folder)
    served = serve(folder=folder)
    body = {"prompt": "Hi", "max_tokens": 4}
    bound = httpx.post(f"{served.url}/v1/completions", json=body | {"response_format": {"type": "json_object"}})
    assert bound.status_code == 400 and bound.json()["error"]["param"] == "response_format", bound.text
    assert httpx.post(f"{served.url}/v1/completions", json=body).json()["usage"]["completion_tokens"] == 4


def test_a_checkpoint_without_a_chat_template_is_offered_a_completion_to_try(checkpoint, tmp_path, serve):
    folder = shutil.copytree(checkpoint, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    served = serve(folder=folder)
    offered = next(line for line in served.process.stdout if "curl" in line)
    assert f"{served.url}/v1/completions " in offered
