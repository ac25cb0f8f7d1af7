"""Everybody is served by one thread, the event loop's: it neither runs nor waits for work as long as a client likes."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading

import pytest
from leyden.engine.outputs import StepOutput
from leyden.server.answers import logprobs, pieces, streaming
from leyden.server.door import body as json_body
from leyden.server.door import prompts, validation
from leyden.server.off_loop import CHARS_PER_SCORE, MAX_CHARS_INLINE
from leyden.server.responses_api import request as responses_request

MOST_INLINE = MAX_CHARS_INLINE // CHARS_PER_SCORE  # scores
GUARD_SECONDS = 20


@pytest.fixture
def held_tokenizer(tokenizer):
    """One that takes until `may_end` for a long text."""
    encode, tokenizer.may_end, tokenizer.num_held = tokenizer.encode, threading.Event(), 0

    def hold(text):
        if len(text) > MAX_CHARS_INLINE:
            tokenizer.num_held += 1
            assert tokenizer.may_end.wait(GUARD_SECONDS), "whoever should go on meanwhile did not"

    def encode_held(text, *options, **settings):
        hold(text)
        return encode(text, *options, **settings)

    encode_chat = tokenizer.encode_chat

    def encode_chat_held(messages, **settings):
        hold(messages[0]["content"])
        return encode_chat(messages, **settings)

    tokenizer.encode, tokenizer.encode_chat = encode_held, encode_chat_held
    yield tokenizer
    tokenizer.may_end.set()


LONG = "long" * 1000
LONG_PROMPTS = {
    "/v1/completions": {"prompt": LONG},
    "/v1/chat/completions": {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": "Hi"}]},
    "/v1/responses": {"instructions": LONG, "input": "Hi"},
    "/tokenize": {"prompt": LONG},
}


@pytest.mark.parametrize("path", LONG_PROMPTS)
async def test_while_long_texts_are_tokenized_everybody_else_is_served(
    make_client, engine, held_tokenizer, eventually, path
):
    """More of them than there are threads."""
    engine.info.max_model_len, engine.hold_after = 10_000, 3
    client = make_client()
    stream = asyncio.create_task(client.post("/v1/completions", json={"prompt": "Hi", "stream": True}))
    await eventually(lambda: engine.num_open == 1)
    held = [asyncio.create_task(client.post(path, json=LONG_PROMPTS[path])) for _ in range(40)]
    await eventually(lambda: held_tokenizer.num_held > 0)
    engine.hold_after = None
    assert (await stream).text.endswith("data: [DONE]\n\n"), "a running stream"
    assert (await client.get("/health")).status_code == 200
    for short, body in {
        "/v1/completions": {"prompt": "Hi"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
        "/tokenize": {"prompt": "Hi"},
    }.items():
        assert (await client.post(short, json=body)).status_code == 200
    assert not any(task.done() for task in held)
    held_tokenizer.may_end.set()
    assert {(await task).status_code for task in held} == {200}


class Writers:
    """Who wrote how many log-probabilities in one call."""

    def __init__(self, monkeypatch):
        self.loop, self.calls = threading.get_ident(), []
        chat, write = logprobs.chat_logprobs, logprobs.CompletionLogprobsWriter.write

        def note(entries):
            self.calls.append((sum(1 + entry.num_top for entry in entries if entry), threading.get_ident()))

        def chat_noted(entries, num_top, names):
            note(entries)
            return chat(entries, num_top, names)

        def write_noted(writer, entries, first_token_id=None):
            note(entries)
            return write(writer, entries, first_token_id)

        for name in ("answers.logprobs", "answers.chat", "responses_api.writer"):
            monkeypatch.setattr(f"leyden.server.{name}.chat_logprobs", chat_noted)
        monkeypatch.setattr(logprobs.CompletionLogprobsWriter, "write", write_noted)

    def check(self, num_scores):
        assert sum(count for count, _ in self.calls) == num_scores
        assert max(count for count, _ in self.calls) <= 21 * max(streaming.TOKENS_PER_EVENT, logprobs.TOKENS_AT_ONCE)
        inline = [count for count, thread in self.calls if thread == self.loop]
        assert max(inline, default=0) <= MOST_INLINE


CHAT = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 20}
RESPONSE = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 20}
MANY_SCORES = {
    "completions": ("/v1/completions", {"prompt": "Hi", "logprobs": 20, "max_tokens": 2000}),
    "a scored prompt": ("/v1/completions", {"prompt": "y" * 1500, "echo": True, "logprobs": 20, "max_tokens": 0}),
    "chat": ("/v1/chat/completions", CHAT),
    "responses": ("/v1/responses", RESPONSE),
}


@pytest.fixture
def piled_engine(engine):
    """One whose reader finds all of an answer at once, as a slow one does."""
    engine.info.max_model_len, engine.reply = 10_000, b"x" * 1000
    give = engine._outputs

    async def all_at_once(request):
        outputs = [output async for output in give(request)]
        whole: StepOutput = outputs[0]
        for output in outputs[1:]:
            whole.extend(output)
        yield whole

    engine._outputs = all_at_once
    return engine


def scored_tokens(answer):
    """The tokens whose log-probabilities an answer or a chunk shows."""
    if "output" in answer:
        return [entry["token"] for item in answer["output"] for part in item["content"] for entry in part["logprobs"]]
    found = [choice["logprobs"] or {"content": []} for choice in answer["choices"]]
    return [token for each in found for token in each.get("tokens") or [entry["token"] for entry in each["content"]]]


@pytest.mark.parametrize(("path", "body"), MANY_SCORES.values(), ids=MANY_SCORES)
async def test_many_scores_are_written_a_few_at_a_time_and_off_the_event_loop(
    client, piled_engine, monkeypatch, path, body
):
    writers = Writers(monkeypatch)
    whole = (await client.post(path, json=body)).json()
    tokens = scored_tokens(whole)
    assert len(tokens) >= 1000
    num_scores = 21 * len([token for token in tokens if token != "<s>"])
    writers.check(num_scores)
    writers.calls.clear()
    frames = (await client.post(path, json=body | {"stream": True})).text.split("\n\n")
    writers.check(num_scores)
    events = [json.loads(frame.partition("data: ")[2]) for frame in frames if frame and "[DONE]" not in frame]
    if path == "/v1/responses":
        assert scored_tokens(events[-1]["response"]) == tokens
        texts = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        assert len(texts) > 1 and "".join(texts) == "x" * 1000
    else:
        assert [token for event in events for token in scored_tokens(event)] == tokens
        texts = [
            choice.get("text") or choice.get("delta", {}).get("content") or ""
            for e in events
            for choice in e["choices"]
        ]
        assert "".join(texts) in ("x" * 1000, "y" * 1500)
        assert len([text for text in texts if text]) > 1 or body.get("echo")


async def test_a_large_answer_is_sent_in_pieces_between_which_others_have_their_turn(make_app, piled_engine):
    sizes, num_turns = [], 0
    app, body = make_app(), json.dumps(CHAT).encode()

    async def take_turns():
        nonlocal num_turns
        while True:
            await asyncio.sleep(0)
            num_turns += 1

    async def send(message):
        sizes.append((len(message.get("body", b"")), num_turns))

    messages = [{"type": "http.request", "body": body}]

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "root_path": ""}
    turns = asyncio.create_task(take_turns())
    await app(scope, receive, send)
    turns.cancel()
    assert len(sizes) > 10
    assert max(size for size, _ in sizes) < 4 * pieces.MAX_BYTES_SENT
    at = [turn for _, turn in sizes[1:-1]]
    assert all(later > earlier for earlier, later in itertools.pairwise(at))


PARTS = [{"type": "text", "text": ""}] * 4000
LONG_BODIES = {
    "token ids": ("/v1/completions", {"prompt": [5] * 40_000}),
    "lists of token ids": ("/v1/completions", {"prompt": [[5] * 40_000, [6] * 40_000]}),
    "parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": PARTS}]}),
    "items": ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": ""}] * 4000}]}),
    "tokens": ("/detokenize", {"tokens": [5] * 40_000}),
}


@pytest.mark.parametrize(("path", "body"), LONG_BODIES.values(), ids=LONG_BODIES)
async def test_a_long_body_is_parsed_and_checked_off_the_event_loop_a_piece_at_a_time(
    client, engine, tokenizer, monkeypatch, path, body
):
    engine.info.max_model_len = 100_000
    threads = {}

    def noted(module, name, work):
        def wrapped(*arguments, **fields):
            threads.setdefault(name, set()).add(threading.get_ident())
            return work(*arguments, **fields)

        monkeypatch.setattr(module, name, wrapped)

    for module, name in [
        (json_body, "parse_object"),
        (json_body, "_integer"),
        (validation, "_as_typed"),
        (responses_request, "_as_chat"),
        (prompts, "_as_token_ids"),
    ]:
        noted(module, name, getattr(module, name))
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert len(threads) >= 2
    assert threading.get_ident() not in set().union(*threads.values())
    assert ("_integer" in threads) == any(name in body for name in ("prompt", "tokens")), "it gives others their turn"


async def test_long_texts_leave_processors_for_others(make_app, engine, tokenizer, eventually):
    """However many there are, and short ones do not wait for them."""
    app = make_app()
    state, num_at_once, most = app.state.server, 0, 0
    bound = state.long_texts._value
    assert 1 <= bound <= max((os.cpu_count() or 1) // 2, 1)
    may_end = threading.Event()

    def work():
        nonlocal num_at_once, most
        num_at_once += 1
        most = max(most, num_at_once)
        assert may_end.wait(GUARD_SECONDS)
        num_at_once -= 1

    tasks = [asyncio.create_task(prompts.tokenizing(10**6, state, work)) for _ in range(bound + 3)]
    await eventually(lambda: num_at_once == bound)
    assert await prompts.tokenizing(10, state, lambda: "short") == "short"
    assert await prompts.tokenizing(MAX_CHARS_INLINE + 1, state, lambda: "longer") == "longer"
    may_end.set()
    await asyncio.gather(*tasks)
    assert most == bound
