from __future__ import annotations

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk


async def test_a_chat_stream_is_role_then_text_then_reason_then_done(chat, chunks_of, engine):
    engine.reply = b"ab"
    response = await chat(stream=True)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    chunks = chunks_of(response)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}
    assert [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "a"}, None),
        ({"content": "b"}, None),
        ({}, "stop"),
    ]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


async def test_a_completion_stream_joins_to_the_same_text_as_the_whole_answer(complete, chunks_of):
    whole = (await complete()).json()["choices"][0]
    chunks = chunks_of(await complete(stream=True))
    for chunk in chunks:
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert set(chunk["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 12 + ["stop"]
    Completion.model_validate(chunks[-1], strict=True)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


@pytest.mark.parametrize("path", ["complete", "chat"])
async def test_include_usage_adds_a_last_chunk_without_choices_and_null_on_the_others(path, asks, chunks_of):
    ask = asks[path]
    expected = (await ask()).json()["usage"]
    *chunks, last = chunks_of(await ask(stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == expected


@pytest.mark.parametrize("path", ["complete", "chat"])
async def test_continuous_usage_counts_up_on_every_chunk(path, asks, chunks_of):
    ask = asks[path]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(await ask(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == (1 if path == "complete" else 0)
    assert counts[-1] == 13


async def test_streams_of_several_choices_interleave_and_each_is_whole(complete, chunks_of, engine):
    engine.choose_reply = lambda request: b"choice " + request.request_id[-1].encode()
    chunks = chunks_of(await complete(prompt=["a", "b"], n=2, stream=True))
    texts, order = {}, []
    for chunk in chunks:
        choice = chunk["choices"][0]
        order.append(choice["index"])
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {index: f"choice {index}" for index in range(4)}
    assert order != sorted(order)


async def test_every_chat_choice_begins_with_its_role_and_ends_with_its_reason(chat, chunks_of):
    deltas = {}
    for chunk in chunks_of(await chat(n=3, stream=True)):
        choice = chunk["choices"][0]
        deltas.setdefault(choice["index"], []).append((choice["delta"], choice["finish_reason"]))
    assert sorted(deltas) == [0, 1, 2]
    for parts in deltas.values():
        assert parts[0] == ({"role": "assistant", "content": ""}, None)
        assert parts[-1] == ({}, "stop")


async def test_half_a_character_never_reaches_the_stream(chat, chunks_of, engine):
    engine.reply = "aé€😀".encode()
    chunks = chunks_of(await chat(stream=True))
    contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert [content for content in contents if content] == ["a", "é", "€", "😀"]


async def test_text_that_may_become_a_stop_string_is_held_back(complete, chunks_of):
    chunks = chunks_of(await complete(stream=True, stop=["lo, world!", "orl"]))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello, w"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_text_offsets_run_on_across_chunks_and_echo_comes_first(complete, chunks_of, engine):
    engine.reply = b"yz"
    chunks = chunks_of(await complete(prompt=[97, 98], echo=True, logprobs=1, stream=True))
    parts = [chunk["choices"][0] for chunk in chunks]
    assert parts[0]["text"] == "aby"
    logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
    assert [offset for entry in logprobs for offset in entry["text_offset"]] == [0, 1, 2, 3, 4]
    assert [token for entry in logprobs for token in entry["tokens"]] == ["a", "b", "y", "z", "</s>"]
    assert logprobs[0]["token_logprobs"][0] is None


async def test_streamed_logprobs_equal_the_whole_answers(chat, chunks_of):
    whole = (await chat(logprobs=True, top_logprobs=1)).json()["choices"][0]["logprobs"]["content"]
    chunks = chunks_of(await chat(logprobs=True, top_logprobs=1, stream=True))
    found = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert found == whole


async def test_logprobs_of_a_token_come_even_when_its_text_is_held_back(complete, chunks_of, engine):
    engine.reply = "é".encode()
    parts = [chunk["choices"][0] for chunk in chunks_of(await complete(logprobs=0, stream=True))]
    assert [(part["text"], part["logprobs"]["tokens"]) for part in parts] == [
        ("", ["bytes:\\xc3"]),
        ("é", ["bytes:\\xa9"]),
        ("", ["</s>"]),
    ]


async def test_echo_with_max_tokens_0_streams_the_prompt_and_its_reason(complete, chunks_of):
    chunks = chunks_of(await complete(echo=True, max_tokens=0, stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hi"]
    assert chunks[0]["choices"][0]["finish_reason"] == "length"


async def test_streamed_token_ids_join_to_the_whole_answers(complete, chat, chunks_of):
    whole = (await complete(return_token_ids=True)).json()["choices"][0]
    parts = [chunk["choices"][0] for chunk in chunks_of(await complete(return_token_ids=True, stream=True))]
    assert [token_id for part in parts for token_id in part["token_ids"]] == whole["token_ids"]
    assert parts[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert "prompt_token_ids" not in parts[1]
    chunks = chunks_of(await chat(return_token_ids=True, stream=True))
    assert chunks[0]["prompt_token_ids"]
    ids = [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])]
    assert ids == whole["token_ids"]


@pytest.mark.parametrize("path", ["complete", "chat"])
@pytest.mark.parametrize(
    ("fault", "code"),
    [("die_after", "engine_dead"), ("fail_after", "generation_failed"), ("abort_after", "generation_aborted")],
)
async def test_an_error_after_the_start_is_an_event_and_then_done_and_is_counted(
    path, fault, code, asks, chunks_of, engine, client
):
    setattr(engine, fault, 3)
    response = await asks[path](stream=True)
    assert response.status_code == 200
    chunks = chunks_of(response)
    assert list(chunks[-1]) == ["error"]
    assert chunks[-1]["error"]["type"] == "server_error"
    assert chunks[-1]["error"]["code"] == code
    assert "secret" not in response.text
    assert all("finish_reason" in chunk["choices"][0] for chunk in chunks[:-1])
    assert engine.num_open == 0
    refused = [line for line in (await client.get("/metrics")).text.splitlines() if "request_refused_total{" in line]
    assert refused == [f'leyden:request_refused_total{{model_name="tiny",reason="{code}"}} 1.0']


async def test_one_failing_choice_ends_the_whole_stream_and_aborts_the_others(complete, chunks_of, engine):
    engine.reply = b"x" * 100
    engine.fail_after = 3
    engine.is_faulty = lambda request: request.request_id.endswith("-2")
    chunks = chunks_of(await complete(n=4, max_tokens=100, stream=True))
    assert chunks[-1]["error"]["code"] == "generation_failed"
    assert engine.num_open == 0
    assert engine.num_aborted == 3
