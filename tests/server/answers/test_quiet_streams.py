"""A stream without a token yet sends its headers and comments, and no client takes a comment for anything else."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from callers import Caller
from leyden.server.answers.streaming import PING, EventStream

BODIES = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"input": "Hi"},
}
GUARD_SECONDS = 20


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(EventStream, "patience", 0.01)
    monkeypatch.setattr(EventStream, "ping_seconds", 0.01)


@pytest.fixture
def patient(monkeypatch):
    """However slow the machine is."""
    monkeypatch.setattr(EventStream, "patience", GUARD_SECONDS)


class Reader:
    """One stream over a socket, line by line as httpx cuts it, read by the rules of server-sent events."""

    def __init__(self, live, path, **body):
        self.live, self.path, self.body = live, path, BODIES[path] | body | {"stream": True}
        self.num_pings = 0
        self.status = None
        self.events = []  # (name, data)
        self.task = asyncio.create_task(self._read())

    async def _read(self):
        name, data = "", []
        async with (
            httpx.AsyncClient(timeout=GUARD_SECONDS) as http,
            http.stream("POST", f"{self.live.url}{self.path}", json=self.body) as response,
        ):
            self.status = response.status_code
            async for line in response.aiter_lines():
                field, _, value = line.partition(":")
                if not line and data:
                    self.events.append((name, "\n".join(data)))
                    name, data = "", []
                elif line and not field:
                    self.num_pings += 1
                elif field == "event":
                    name = value.removeprefix(" ")
                elif field == "data":
                    data.append(value.removeprefix(" "))
                else:
                    assert not line, f"{line!r} is no field of an event"


@pytest.mark.parametrize("path", BODIES)
async def test_stream_without_a_token_sends_comments_and_then_the_same_answer(
    make_live, engine, eventually, impatient, path
):
    live = make_live()
    engine.hold_after = 0
    held = Reader(live, path)
    await eventually(lambda: held.num_pings > 2)
    assert held.status == 200 and held.events == []
    engine.hold_after = 4
    await eventually(lambda: held.events)
    num_pings = held.num_pings
    await eventually(lambda: held.num_pings > num_pings + 2)  # between two tokens as well
    engine.hold_after = None
    await held.task
    prompt = Reader(live, path)
    await prompt.task
    assert [name for name, _ in held.events] == [name for name, _ in prompt.events]
    assert len(held.events) >= 13


@pytest.mark.parametrize("path", BODIES)
async def test_an_error_after_the_headers_is_an_event_and_is_counted(
    make_app, make_live, engine, eventually, impatient, path
):
    app = make_app()
    engine.hold_after, engine.die_after = 0, 0
    stream = Reader(make_live(app), path)
    await eventually(lambda: stream.num_pings)
    engine.hold_after = None
    await stream.task
    assert stream.status == 200
    if path == "/v1/responses":
        assert [name for name, _ in stream.events] == [
            "response.created",
            "response.in_progress",
            "error",
            "response.failed",
        ]
    else:
        (_, error), (_, done) = stream.events
        assert (json.loads(error)["error"]["code"], done) == ("engine_dead", "[DONE]")
    counted = 'request_refused_total{model_name="tiny",reason="engine_dead"} 1.0'
    assert counted in app.state.server.metrics.exposition().decode()


async def test_stream_with_tokens_has_no_comments(make_app, patient):
    stream = Caller(make_app(), {"prompt": "a", "stream": True})
    await stream.ended()
    assert PING not in b"".join(message.get("body", b"") for message in stream.messages)


async def test_a_whole_answer_has_no_comments_however_late_it_is(make_app, engine, eventually, impatient):
    engine.hold_after = 0
    whole = Caller(make_app(), {"prompt": "a"})
    await eventually(lambda: engine.num_open == 1)
    await asyncio.sleep(0.1)
    assert whole.messages == []
    engine.hold_after = None
    await whole.ended()
    assert PING not in whole.messages[1]["body"]


def test_the_official_client_skips_comments(make_live, engine, impatient):
    """The benchmark's client: test_bench_parser.py; `leyden chat`: test_terminal.py."""
    live = make_live()
    engine.hold_after = 0
    ai = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=GUARD_SECONDS)
    streams = [
        ai.completions.create(model="tiny", prompt="Hi", stream=True),
        ai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True),
        ai.responses.create(model="tiny", input="Hi", stream=True),
    ]  # each is open: its headers have come, and so has a comment
    engine.hold_after = None
    completion, chat, response = ([*stream] for stream in streams)
    assert "".join(chunk.choices[0].text for chunk in completion) == "Hello, world"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == "Hello, world"
    assert response[-1].response.output_text == "Hello, world"


@pytest.mark.parametrize("path", BODIES)
async def test_no_frame_holds_a_character_that_readers_take_for_an_end_of_line(make_live, engine, patient, path):
    text = "a\u2028b\u2029c\x85d"
    engine.reply = text.encode()
    stream = Reader(make_live(), path)
    await stream.task
    assert stream.num_pings == 0
    said = ""
    for name, data in stream.events:
        if data != "[DONE]" and name in ("", "response.output_text.delta"):
            event = json.loads(data)
            choice = event["choices"][0] if "choices" in event else {}
            said += event.get("delta") or choice.get("text") or choice.get("delta", {}).get("content") or ""
    assert said == text
