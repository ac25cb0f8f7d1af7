"""The official client talks to /v1/responses."""

from __future__ import annotations

import json

import msgspec
import openai
import pytest
from pydantic import BaseModel
from responses import PATCH, REPLIES, TIME, WEATHER, custom_call, user


@pytest.fixture
async def official(engine, tokenizer, make_live):
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "<tool_call> <think>"
    engine.reply = REPLIES["a thought, words and calls"].encode()
    async with openai.AsyncOpenAI(
        base_url=f"{make_live().url}/v1", api_key="x", max_retries=0, timeout=20, _strict_response_validation=True
    ) as client:
        yield client


async def test_clients_stream_helper_and_create_give_the_same(official):
    asked = {"model": "tiny", "input": "Hi", "tools": [WEATHER, TIME]}
    whole = await official.responses.create(**asked)
    async with official.responses.stream(**asked) as stream:
        text = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert text[-1] == final.output_text == whole.output_text == "Let me see."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert [item.arguments for item in final.output[2:]] == [item.arguments for item in whole.output[2:]]
    assert final.usage == whole.usage


class City(BaseModel):
    city: str


async def test_the_clients_parse_helper_gives_its_own_types(official, engine):
    pytest.importorskip("llguidance")
    engine.reply = b'{"city": "Rome"}'
    answer = await official.responses.parse(model="tiny", input="Hi", text_format=City)
    assert answer.output_parsed == City(city="Rome")


async def test_a_tool_loop_goes_round(official, engine, tokenizer):
    asked = {"model": "tiny", "tools": [WEATHER, TIME]}
    first = await official.responses.create(**asked, input="Hi")
    outputs = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in first.output
        if item.type == "function_call"
    ]
    engine.reply = b"It is sunny."
    second = await official.responses.create(**asked, input=[user("Hi"), *first.output, *outputs])
    assert second.output_text == "It is sunny."
    assert [message["role"] for message in tokenizer.chats[-1][0]] == ["user", "assistant", "tool", "tool"]


async def test_leaving_a_stream_aborts_it(official, engine, eventually):
    engine.hold_after = 2
    stream = await official.responses.create(model="tiny", input="Hi", stream=True)
    async for _ in stream:
        break
    await stream.close()
    await eventually(lambda: engine.num_aborted == 1)
    assert engine.num_open == 0


async def test_leaving_before_the_whole_answer_is_there_aborts_it(official, engine, eventually):
    engine.hold_after = 2
    with pytest.raises(openai.APITimeoutError):
        await official.with_options(timeout=0.2).responses.create(model="tiny", input="Hi")
    await eventually(lambda: engine.num_aborted == 1)
    assert engine.num_open == 0


async def test_the_clients_stream_helper_follows_calls_of_custom_tools(official, engine):
    engine.reply = (custom_call(json.dumps({"input": "+a\nö"})) + "}\n</tool_call>").encode()
    asked = {
        "model": "tiny",
        "input": "Hi",
        "tools": [PATCH, {"type": "web_search"}],
        "reasoning": {"effort": "medium", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
    }
    whole = await official.responses.create(**asked)
    async with official.responses.stream(**asked) as stream:
        deltas = [event.delta async for event in stream if event.type == "response.custom_tool_call_input.delta"]
        final = await stream.get_final_response()
    assert "".join(deltas) == final.output[0].input == whole.output[0].input == "+a\nö"
    assert (final.output[0].type, final.output[0].name) == ("custom_tool_call", "apply_patch")
    again = await official.responses.create(**asked | {"input": [user("Hi"), *whole.output]})
    assert again.status == "completed"
