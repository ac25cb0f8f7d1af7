"""The benchmark's client against the real app over a scripted engine, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from leyden.benchmarks.load.client import Client, run_closed
from leyden.benchmarks.load.flags import Span
from leyden.benchmarks.load.load import Load, Workload
from leyden.benchmarks.load.serving import served_models
from leyden.benchmarks.load.target import Target
from leyden.benchmarks.load.workers import Share, run_share

WORKLOAD = Workload("completions", "tiny", "ids", Span(5, 5), Span(7, 7), 200, 0.0, True, False, seed=0)
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


async def samples_of(target: Target, load: Load, workload: Workload = WORKLOAD, seconds: float = 20.0):
    """What one worker would have seen."""
    share = Share(target, workload, load, seconds)
    client = Client(target, workload.endpoint, ignore_eos=workload.ignore_eos, timeout=seconds)
    requests = [(request, client.write(request)) for request in share.requests()]
    samples = await run_share(share, requests, client, time.perf_counter())
    client.close()
    return samples


@asynccontextmanager
async def answering(*parts: bytes, pause: float = 0.0):
    """A server that answers every request with the same bytes and then closes the connection."""
    asked, handlers = [], []

    async def serve(reader, writer):
        handlers.append(asyncio.current_task())
        try:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1], False, "", None), asked
    finally:
        server.close()
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


def event(text: str) -> bytes:
    data = f"data: {text}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.mark.parametrize("load", [Load(9, concurrency=4), Load(9, rate=200.0)], ids=str)
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_every_request_is_answered_and_its_tokens_are_counted(make_live, engine, load, endpoint):
    target = Target.parse(make_live().url, None)
    workload = replace(WORKLOAD, endpoint=endpoint, prompt_kind="ids" if endpoint == "completions" else "text")
    samples = await samples_of(target, load, workload)
    assert sorted(sample.index for sample in samples) == list(range(9))
    for sample in samples:
        assert sample.error is None
        assert (sample.num_output_tokens, sum(sample.tokens)) == (7, 7)
        assert sample.started <= sample.times[0] <= sample.times[-1] <= sample.ended
        assert endpoint == "chat" or sample.num_prompt_tokens == 5
    assert len(engine.requests) == 9


async def test_closed_streams_bound_what_is_open_and_reuse_their_connections(make_live, engine):
    most = 0
    reply = engine.choose_reply

    def watch(request):
        nonlocal most
        most = max(most, engine.num_open)
        return reply(request)

    engine.choose_reply = watch
    target = Target.parse(make_live().url, None)
    client = Client(target, "completions", ignore_eos=True, timeout=20.0)
    made = []
    connect = client._connect

    async def count():
        made.append(1)
        return await connect()

    client._connect = count
    requests = [WORKLOAD.request(i) for i in range(12)]
    samples = await run_closed(client, [(request, client.write(request)) for request in requests], 3)
    client.close()
    assert all(sample.error is None for sample in samples)
    assert most <= 3
    assert len(made) == 3


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"queue_bound": 0}, "status 429"),
        ({"is_healthy": False}, "status 503"),
        ({"fail_after": 3}, "error in the stream"),
        ({"reply": b"short"}, "answer not of max_tokens"),
    ],
)
async def test_what_the_server_says_is_the_kind_of_the_error(make_live, engine, fault, kind):
    for name, value in fault.items():
        setattr(engine, name, value)
    samples = await samples_of(Target.parse(make_live().url, None), Load(3, concurrency=2))
    assert [sample.error for sample in samples] == [kind] * 3


async def test_a_short_answer_is_fine_when_the_model_may_stop(make_live, engine):
    engine.reply = b"abc"
    workload = replace(WORKLOAD, ignore_eos=False)
    (sample,) = await samples_of(Target.parse(make_live().url, None), Load(1, concurrency=1), workload)
    assert sample.error is None
    assert sum(sample.tokens) == sample.num_output_tokens <= 4


@pytest.mark.parametrize("key", ["secret", "kéy"])
async def test_a_key_is_sent_when_there_is_one(make_live, key):
    url = make_live(api_key=[key]).url
    assert list(served_models(Target.parse(url, key))) == ["tiny"]
    (refused,) = await samples_of(Target.parse(url, None), Load(1, concurrency=1))
    (sample,) = await samples_of(Target.parse(url, key), Load(1, concurrency=1))
    assert (refused.error, sample.error) == ("status 401", None)


CHUNK = '{"choices": [{"index": 0, "text": "x"}]}'
MISBEHAVIOUR = {
    "connection closed": (HEAD, event(CHUNK)),
    "malformed response": (HEAD, event("{not json")),
    "no tokens": (HEAD, event("[DONE]"), b"0\r\n\r\n"),
    "stream without [DONE]": (HEAD, event(CHUNK), b"0\r\n\r\n"),
    "answer not of max_tokens": (HEAD, event(CHUNK), event("[DONE]"), b"0\r\n\r\n"),
    "status 500": (b"HTTP/1.1 500 x\r\ncontent-length: 2\r\n\r\nno",),
}


@pytest.mark.parametrize(("kind", "parts"), MISBEHAVIOUR.items(), ids=MISBEHAVIOUR)
async def test_no_misbehaviour_is_dropped_and_the_next_request_is_sent_all_the_same(kind, parts):
    async with answering(*parts) as (target, asked):
        samples = await samples_of(target, Load(3, concurrency=1))
    assert [sample.error for sample in samples] == [kind] * 3
    assert len(asked) == 3


async def test_a_server_that_hangs_is_a_timeout_and_one_that_is_not_there_an_error():
    async with answering(HEAD, event(CHUNK), pause=5.0) as (target, _):
        (hanging,) = await samples_of(target, Load(1, concurrency=1), seconds=0.1)
    (absent,) = await samples_of(Target("127.0.0.1", 1, False, "", None), Load(1, concurrency=1))
    assert hanging.error == "timeout"
    assert absent.error == "connection: ConnectionRefusedError"


@pytest.mark.parametrize(
    ("chunks", "tokens"),
    [
        ([CHUNK] * 7, [1] * 7),  # a chunk with text is a token
        (['{"choices": [{"token_ids": [1, 2, 3]}]}', '{"choices": [{"text": "", "token_ids": [4, 5, 6, 7]}]}'], [3, 4]),
        (
            [
                '{"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": {"completion_tokens": 0}}',
                '{"choices": [{"delta": {"content": "ab"}}], "usage": {"completion_tokens": 2}}',
                '{"choices": [{"delta": {"content": "c"}}], "usage": {"completion_tokens": 7, "prompt_tokens": 9}}',
                '{"choices": [{"delta": {}, "finish_reason": "length"}], "usage": {"completion_tokens": 7}}',
            ],
            [2, 5],
        ),
        ([CHUNK] * 2 + ['{"choices": [], "usage": {"completion_tokens": 7}}'], [1, 1]),  # the total is no chunk
    ],
    ids=["text", "token ids", "usage", "total"],
)
async def test_tokens_are_counted_by_usage_then_ids_then_text(chunks, tokens):
    parts = (HEAD, *map(event, chunks), event("[DONE]"), b"0\r\n\r\n")
    async with answering(*parts) as (target, _):
        (sample,) = await samples_of(target, Load(1, concurrency=1))
    assert sample.error is None
    assert list(sample.tokens) == tokens
    assert sample.num_output_tokens == 7


@pytest.mark.parametrize(
    ("url", "path"),
    [("http://h:1", ""), ("http://h:1/v1/", ""), ("https://h/a/v1", "/a"), ("http://[::1]:8000", "")],
)
def test_an_address_may_have_a_path_and_v1(url, path):
    target = Target.parse(url, None)
    assert target.path == path
    assert target.post("/v1/x", {}).startswith(f"POST {path}/v1/x HTTP/1.1\r\n".encode())
    assert target.url.startswith(url.partition("/v1")[0].rstrip("/").removesuffix(path))
