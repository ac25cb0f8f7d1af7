"""Chats with a checkpoint of Ring-linear: its roles, its two stop ids, its thoughts and its calls, over HTTP."""

from __future__ import annotations

import json

import pytest
from leyden.configs.schema import EngineConfig, ServerConfig
from leyden.engine.async_llm import AsyncLLM
from leyden.engine.boundary.in_process import InProcessClient
from leyden.engine.text.tokenizer import Tokenizer
from leyden.server.commands.info import describe_model
from leyden.server.http.app import create_app
from ring_reference import END, ROLE_END, TINY, make_tensors, save

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ring")
    save(path, TINY, make_tensors(TINY))
    return path


@pytest.fixture
def tokenizer(folder):
    return Tokenizer(folder)


@pytest.fixture
def say(engine, tokenizer):
    """Let the engine answer this text, whose control tokens are tokens, and then `<|role_end|>`."""
    engine.info.max_model_len = 4096

    def say(text):
        engine.reply = tokenizer.encode(text, add_special_tokens=False, parse_special=True)

    return say


def test_prompt_is_written_in_the_roles_of_the_template(engine, tokenizer, chat):
    """A user's text makes no control tokens."""
    assert tokenizer.eos_token_ids == {END, ROLE_END}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|role_end|>"}]
    ids = tokenizer.encode_chat(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking on<|role_end|>"
        "<role>HUMAN</role>Hi <|role_end|><|role_end|><role>ASSISTANT</role>"
    )
    assert ids.count(ROLE_END) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_thought_and_answer_are_parted(say, chat, chunks_of, stream):
    say("<think>\nHm, so.\n</think>\n\nIt rains.")
    response = await chat(stream=stream, max_tokens=100)
    message = joined(chunks_of(response)) if stream else response.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, so.", "It rains.")


@pytest.mark.parametrize("stream", [False, True])
async def test_call_in_json_is_read(say, chat, chunks_of, stream):
    say(f"<think>\nLook it up.\n</think>\n\n{CALL}")
    response = await chat(stream=stream, max_tokens=200, tools=TOOLS)
    message = joined(chunks_of(response)) if stream else response.json()["choices"][0]["message"]
    assert message["reasoning_content"] == "Look it up." and not message["content"]
    (call,) = message["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Oslo"})


async def test_call_and_its_result_are_written_back_as_the_model_wrote_them(say, chat, engine, tokenizer):
    say(CALL)
    message = (await chat(max_tokens=200, tools=TOOLS)).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    await chat(messages=[{"role": "user", "content": "Weather?"}, message, result], tools=TOOLS, max_tokens=1)
    prompt = tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert "<role>HUMAN</role>Weather?<|role_end|><role>ASSISTANT</role>" in prompt
    assert f"{CALL}<|role_end|><role>OBSERVATION</role>rain<|role_end|><role>ASSISTANT</role>" in prompt


def joined(chunks):
    """The message that the chunks of a stream make."""
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            for name in ("content", "reasoning_content"):
                message[name] += choice["delta"].get(name) or ""
            for call in choice["delta"].get("tool_calls") or []:
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"function": {"name": call["function"]["name"], "arguments": ""}})
                message["tool_calls"][-1]["function"]["arguments"] += call["function"].get("arguments") or ""
    return message


@pytest.mark.parametrize("stop_id", [END, ROLE_END])
async def test_either_stop_id_ends_an_answer_and_is_not_shown(make_client, folder, stop_id):
    """config.json names the one, generation_config.json both."""
    engine = InProcessClient(EngineConfig(model=str(folder), device="cpu", cpu_memory_gb=0.2, num_threads=1))
    await engine.start()
    client = make_client(create_app(AsyncLLM(engine, Tokenizer(folder)), ServerConfig(), model_name="ring"))
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, "logit_bias": {str(stop_id): 100}}
    choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    await engine.close()
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")


def test_folder_is_described(folder):
    told = describe_model(EngineConfig(model=str(folder), device="cpu", cpu_memory_gb=0.2), None)
    assert "BailingMoeLinearV2ForCausalLM" in told and "4 lightning, 2 softmax" in told
