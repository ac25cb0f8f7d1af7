"""Tools and thoughts over HTTP, answered by a script: what the template gets, and what the client gets back."""

from __future__ import annotations

import json

import msgspec
import openai
import pytest
from leyden.engine.text import grammar
from openai.types.chat import ChatCompletion, ChatCompletionChunk

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TEMPLATES = {
    "hermes": "tools <tool_call>",
    "minimax": "tools <tool_calls>",
    "kimi_k2": "tools <|tool_call_begin|>",
    "qwen3_coder": "tools <tool_call><function=f><parameter=a>",
}
CALLS = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>',
    "minimax": '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_calls>\n',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Köln"}<|tool_call_end|><|tool_calls_section_end|>',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n"
    "</function>\n</tool_call>",
}
BOTH = CALLS["hermes"] + '\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@pytest.fixture
def ask(engine, tokenizer, make_client):
    """ask(reply, template=..., settings={...}, **body) -> response of a conversation with tools."""
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)

    async def ask(reply="Hello", *, template=TEMPLATES["hermes"], settings=None, **body):
        engine.reply = reply.encode() if isinstance(reply, str) else reply
        tokenizer.chat_template = template
        body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER, TIME]} | body
        return await make_client(**(settings or {})).post("/v1/chat/completions", json=body)

    return ask


@pytest.fixture
def prompt_ends_in(tokenizer):
    """prompt_ends_in(text): what a template puts at the end of every prompt."""
    encode = tokenizer.encode_conversation

    def change(text):
        def encode_conversation(*args, **kwargs):
            ids, beginning = encode(*args, **kwargs)
            return ids + list(text.encode()), beginning

        tokenizer.encode_conversation = encode_conversation

    return change


def choice_of(response):
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json(), strict=True)
    return response.json()["choices"][0]


def assembled(chunks):
    """What a client makes of a stream: content, reasoning, calls, finish reason."""
    content = reasoning = ""
    calls, reason = [], None
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        choice = chunk["choices"][0]
        delta, reason = choice["delta"], choice["finish_reason"]
        content += delta.get("content") or ""
        reasoning += delta.get("reasoning_content") or ""
        for piece in delta.get("tool_calls", []):
            if "id" in piece:
                assert piece["index"] == len(calls)
                assert piece["type"] == "function" and piece["function"]["arguments"] == ""
                calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
            else:
                assert set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"}
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return content, reasoning, calls, reason


# -- answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_call_is_a_tool_call_and_nothing_else(ask, name):
    choice = choice_of(await ask(CALLS[name], template=TEMPLATES[name]))
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"content": None, "role": "assistant", "refusal": None}
    assert choice["finish_reason"] == "tool_calls"
    assert call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}
    assert call["id"] == "functions.get_weather:0" if name == "kimi_k2" else call["id"].startswith("call_")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("before", ["", "Let me see. "])
async def test_a_stream_assembles_to_the_whole_answer(ask, chunks_of, name, before):
    reply, template = before + CALLS[name], TEMPLATES[name]
    whole = choice_of(await ask(reply, template=template))
    chunks = chunks_of(await ask(reply, template=template, stream=True))
    content, _, calls, reason = assembled(chunks)
    assert content == (whole["message"]["content"] or "") == before.rstrip()
    assert [call["function"] for call in calls] == [call["function"] for call in whole["message"]["tool_calls"]]
    assert reason == whole["finish_reason"] == "tool_calls"
    num_pieces = sum(len(chunk["choices"][0]["delta"].get("tool_calls", [])) for chunk in chunks)
    assert num_pieces > 5, "arguments go out as they come"


async def test_several_calls_have_ids_of_their_own(ask):
    calls = choice_of(await ask(BOTH))["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["get_weather", "get_time"]
    assert calls[0]["id"] != calls[1]["id"]


async def test_without_parallel_calls_only_the_first_is_given(ask, chunks_of):
    calls = choice_of(await ask(BOTH, parallel_tool_calls=False))["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["get_weather"]
    _, _, calls, reason = assembled(chunks_of(await ask(BOTH, parallel_tool_calls=False, stream=True)))
    assert ([call["function"]["name"] for call in calls], reason) == (["get_weather"], "tool_calls")


async def test_a_call_that_is_cut_off_ends_with_length(ask, chunks_of):
    max_tokens = CALLS["hermes"].encode().index(b"K")
    choice = choice_of(await ask(CALLS["hermes"], max_tokens=max_tokens))
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'
    content, _, calls, reason = assembled(chunks_of(await ask(CALLS["hermes"], max_tokens=max_tokens, stream=True)))
    assert (content, calls[0]["function"]["arguments"], reason) == ("", '{"city": "', "length")


async def test_a_malformed_call_is_content(ask, chunks_of):
    reply = "<tool_call>\n{'name': 'f'}\n</tool_call>"
    choice = choice_of(await ask(reply))
    assert choice["message"] == {"content": reply, "role": "assistant", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert assembled(chunks_of(await ask(reply, stream=True))) == (reply, "", [], "stop")


async def test_calls_are_text_when_no_tools_are_offered(ask):
    for body in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        choice = choice_of(await ask(CALLS["hermes"], **body))
        assert choice["message"]["content"] == CALLS["hermes"]
        assert choice["finish_reason"] == "stop"


async def test_every_choice_has_its_own_calls(ask, engine, chunks_of):
    engine.choose_reply = lambda request: (CALLS["hermes"] if request.request_id.endswith("1") else "no").encode()
    body = (await ask(n=2)).json()
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "tool_calls"]
    chunks = chunks_of(await ask(n=2, stream=True))
    for index, expected in enumerate(("stop", "tool_calls")):
        *_, calls, reason = assembled([chunk for chunk in chunks if chunk["choices"][0]["index"] == index])
        assert (len(calls), reason) == (index, expected)


async def test_logprobs_and_ids_of_markers_and_arguments_are_all_there(ask, chunks_of):
    options = {"logprobs": True, "return_token_ids": True}
    whole = choice_of(await ask(CALLS["hermes"], **options))
    chunks = chunks_of(await ask(CALLS["hermes"], stream=True, **options))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [i for choice in choices for i in choice.get("token_ids", [])] == whole["token_ids"]
    entries = [entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert entries == whole["logprobs"]["content"]


# -- control tokens as markers --------------------------------------------------------------------------------


@pytest.fixture
def kimi_tokens(tokenizer):
    """Kimi's markers as control tokens of the tokenizer; writes text with them as ids."""
    names = ["calls_section_begin", "call_begin", "call_argument_begin", "call_end", "calls_section_end"]
    ids = {f"<|tool_{name}|>": 300 + i for i, name in enumerate(names)}
    tokenizer.special |= {token_id: text for text, token_id in ids.items()}
    tokenizer.control_ids |= set(ids.values())

    def encode(text):
        for marker, token_id in ids.items():
            text = text.replace(marker, chr(0xE000 + token_id))
        return [i for char in text for i in ([ord(char) - 0xE000] if ord(char) >= 0xE000 else char.encode())]

    return encode


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_markers_that_are_control_tokens_are_seen_but_not_shown(ask, kimi_tokens, chunks_of, is_streamed):
    stray = "<|tool_call_end|>"
    reply = kimi_tokens(f"a{stray}b{CALLS['kimi_k2']}c{stray}<|tool_call_begin|>no call")
    response = await ask(reply, template=TEMPLATES["kimi_k2"], stream=is_streamed)
    if is_streamed:
        content, _, calls, reason = assembled(chunks_of(response))
    else:
        choice = choice_of(response)
        content, calls, reason = choice["message"]["content"], choice["message"]["tool_calls"], choice["finish_reason"]
    assert content == "abcno call"
    assert [call["function"]["arguments"] for call in calls] == ['{"city": "Köln"}']
    assert reason == "tool_calls"


async def test_without_tools_control_tokens_stay_hidden(ask, kimi_tokens):
    reply = kimi_tokens(CALLS["kimi_k2"])
    choice = choice_of(await ask(reply, template=TEMPLATES["kimi_k2"], tools=None))
    assert choice["message"]["content"] == 'functions.get_weather:0{"city": "Köln"}'


# -- thoughts -------------------------------------------------------------------------------------------------


async def test_a_thought_is_reasoning_content(ask, chunks_of):
    reply = "<think>\nHm < 3.\n</think>\n\nYes."
    template = "<think>"
    message = choice_of(await ask(reply, template=template, tools=None))["message"]
    assert message == {"content": "Yes.", "role": "assistant", "refusal": None, "reasoning_content": "Hm < 3."}
    stream = chunks_of(await ask(reply, template=template, tools=None, stream=True))
    assert assembled(stream) == ("Yes.", "Hm < 3.", [], "stop")


async def test_a_thought_before_a_call(ask, chunks_of):
    reply = "<think>\nI look.\n</think>\n\n" + CALLS["hermes"]
    response = await ask(reply, template="tools <tool_call> <think>", stream=True)
    content, reasoning, calls, reason = assembled(chunks_of(response))
    assert (content, reasoning, len(calls), reason) == ("", "I look.", 1, "tool_calls")


async def test_a_thought_that_the_template_opened_is_reasoning(ask, prompt_ends_in):
    prompt_ends_in("<think>\n")
    message = choice_of(await ask("a\n</think>\n\nb", template="<think>", tools=None))["message"]
    assert (message["content"], message["reasoning_content"]) == ("b", "a")
    message = choice_of(await ask("never ends", template="<think>", tools=None))["message"]
    assert (message["content"], message["reasoning_content"]) == ("", "never ends")


STOPPED = {
    "a thought of the model": ("<think>\na\n\nb\n</think>\n\nYes.\n\nNo.", "", "a\n\nb", "Yes.", 29),
    "a thought of the template": ("a\n\nb\n</think>\n\nYes.\n\nNo.", "<think>\n", "a\n\nb", "Yes.", 21),
    "a thought that never ends": ("a\n\nb", "<think>\n", "a\n\nb", "", 5),
    "no thought": ("Yes.\n\nNo.", "", "", "Yes.", 6),
    "thinking turned off": ("\n\nYes.", "<think>\n\n</think>\n\n", "", "", 2),
}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("reply", "tail", "reasoning", "content", "num_tokens"), STOPPED.values(), ids=STOPPED)
async def test_stop_strings_end_the_answer_and_not_the_thought(
    ask, prompt_ends_in, chunks_of, is_streamed, reply, tail, reasoning, content, num_tokens
):
    prompt_ends_in(tail)
    options = {"template": "<think>", "tools": None, "stop": ["\n\n"], "stream": is_streamed}
    response = await ask(reply, **options)
    if is_streamed:
        assert assembled(chunks_of(response)) == (content, reasoning, [], "stop")
    else:
        message = choice_of(response)["message"]
        assert (message["content"], message.get("reasoning_content", "")) == (content, reasoning)
        assert response.json()["usage"]["completion_tokens"] == num_tokens


@pytest.mark.parametrize(("tail", "thinks"), [("", True), ("<think>\n", True), ("<think>\n\n</think>\n\n", False)])
async def test_a_forced_call_begins_with_a_thought_unless_the_prompt_has_closed_it(
    ask, engine, prompt_ends_in, tail, thinks
):
    pytest.importorskip("llguidance")
    prompt_ends_in(tail)
    await ask(CALLS["hermes"], template="tools <tool_call> <think>", tool_choice="required")
    assert ("thought" in engine.requests[-1].sampling_params.grammar) == thinks


async def test_stop_strings_may_be_asked_to_end_a_thought(ask):
    reply = "<think>\na\n\nb\n</think>\n\nYes."
    options = {"template": "<think>", "tools": None, "stop": ["\n\n"], "stop_in_reasoning": True}
    message = choice_of(await ask(reply, **options))["message"]
    assert (message["content"], message["reasoning_content"]) == ("", "a")


@pytest.mark.parametrize(
    ("final", "reply", "content", "reasoning"),
    [
        ("<think>I was", " at home</think>Yes", "Yes", "at home"),
        ("<think>done</think>So", " yes", " yes", None),
        ("So", " yes", " yes", None),
    ],
)
async def test_a_continued_answer_goes_on_thinking_where_it_was(ask, final, reply, content, reasoning):
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": final}]
    options = {"messages": messages, "continue_final_message": True, "tools": None}
    message = choice_of(await ask(reply, template="<think>", **options))["message"]
    assert (message["content"], message.get("reasoning_content")) == (content, reasoning)


async def test_settings_turn_the_parsers_off(ask, error_of):
    off = {"tool_call_parser": "none", "reasoning_parser": "none"}
    reply = "<think>a</think>b"
    message = choice_of(await ask(reply, template="<think>", settings=off, tools=None))["message"]
    assert message["content"] == reply
    error = error_of(await ask(settings=off), 400)
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert "tool_call_parser is none" in error["message"]


async def test_a_parser_is_advised_only_where_the_template_has_tools(ask, error_of):
    foreign = error_of(await ask(template="tools <|call|>"), 400)
    without = error_of(await ask(template="<user>"), 400)
    assert foreign["param"] == without["param"] == "tools"
    assert "set tool_call_parser" in foreign["message"]
    assert "does not use them" in without["message"] and "tool_call_parser" not in without["message"]


# -- requests -------------------------------------------------------------------------------------------------


async def test_the_template_gets_the_tools_and_parsed_calls(ask, tokenizer):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "content": [{"type": "text", "text": "rain"}], "tool_call_id": "call_1"},
        {"role": "assistant", "content": "Rain.", "tool_calls": None, "reasoning_content": "ho"},
        {"role": "assistant", "tool_calls": [call | {"function": {"name": "get_time", "arguments": ""}}]},
    ]
    assert (await ask(messages=messages)).status_code == 200
    ((rendered, tools),) = tokenizer.chats
    no_parameters = TIME["function"] | {"parameters": {"type": "object", "properties": {}}}
    assert tools == [WEATHER, {"type": "function", "function": no_parameters}]
    assert rendered[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [call | {"function": {"name": "get_weather", "arguments": {"city": "Köln"}}}],
    }
    assert rendered[2] == {"role": "tool", "content": "rain", "tool_call_id": "call_1"}
    assert rendered[3] == {"role": "assistant", "content": "Rain.", "reasoning_content": "ho"}
    assert rendered[4]["tool_calls"][0]["function"] == {"name": "get_time", "arguments": {}}


async def test_choice_none_hides_the_tools_from_the_template(ask, tokenizer):
    assert (await ask(tool_choice="none")).status_code == 200
    assert tokenizer.chats[-1][1] is None
    assert (await ask(tool_choice="auto")).status_code == 200
    assert len(tokenizer.chats[-1][1]) == 2
    assert (await ask(tool_choice="auto", tools=[])).status_code == 200
    assert tokenizer.chats[-1][1] is None


async def test_a_model_whose_template_shows_no_calls_refuses_tools(ask, error_of):
    error = error_of(await ask(template="plain"), 400)
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert (await ask(template="plain", tool_choice="none")).status_code == 200


async def test_strict_and_unknown_fields_of_tools_are_told_as_ignored(ask):
    strict = {"type": "function", "function": TIME["function"] | {"strict": True, "color": "red"}, "cache_control": {}}
    response = await ask(tools=[strict])
    ignored = {"tools[].function.strict", "tools[].function.color", "tools[].cache_control"}
    assert set(response.headers["x-ignored-parameters"].split(", ")) == ignored


async def test_tokenize_counts_the_tools(ask, make_client, tokenizer):
    tokenizer.chat_template = TEMPLATES["hermes"]
    messages = [{"role": "user", "content": "Hi"}]
    response = await make_client().post("/tokenize", json={"messages": messages, "tools": [WEATHER]})
    assert response.status_code == 200, response.text
    assert tokenizer.chats[-1][1] == [WEATHER]


def tool(**function):
    return {"type": "function", "function": {"name": "f"} | function}


def called(**fields):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}} | fields
    return [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [call]}]


CALL = "messages[1].tool_calls[0]"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": "f"}, "tools"),
        ({"tools": [7]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool(name=5)]}, "tools[0].function.name"),
        ({"tools": [tool(name="")]}, "tools[0].function.name"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
        ({"tools": [tool(name="x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool(name="f\n")]}, "tools[0].function.name"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool(description="x" * 70_000)]}, "tools[0]"),
        ({"tools": [tool(name=f"f{i}") for i in range(129)]}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tool_choice": ["auto"]}, "tool_choice"),
        ({"tool_choice": {}}, "tool_choice.type"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice.function.name"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": []}, "tool_choice.function.name"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": called(id=None)}, f"{CALL}.id"),
        ({"messages": called(id="")}, f"{CALL}.id"),
        ({"messages": called(id="x" * 300)}, f"{CALL}.id"),
        ({"messages": called(type="custom")}, f"{CALL}.type"),
        ({"messages": called(function=None)}, f"{CALL}.function"),
        ({"messages": called(function={"name": "f"})}, f"{CALL}.function.arguments"),
        ({"messages": called(function={"name": "f", "arguments": {}})}, f"{CALL}.function.arguments"),
        ({"messages": called(function={"name": "f g", "arguments": "{}"})}, f"{CALL}.function.name"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x", "reasoning": 5}]}, "messages[0].reasoning_content"),
    ],
)
async def test_wrong_tool_is_refused_by_its_place(ask, error_of, body, param):
    assert error_of(await ask(**body), 400)["param"] == param


ARGUMENTS = {
    "an object": ('{"a": 1}', {"a": 1}),
    "nothing": (" ", {}),
    "a raw line break": ('{"a": "x\ny"}', {"a": "x\ny"}),
    "a key twice": ('{"a": 1, "a": 2}', {"a": 2}),
    "infinity": ('{"a": Infinity}', {"a": float("inf")}),
    "cut off": ('{"a": "x', '{"a": "x'),
    "two objects": ('{"a": 1}{"b": 2}', '{"a": 1}{"b": 2}'),
    "a list": ("[1]", "[1]"),
    "words": ("none", "none"),
    "a lone surrogate": (r'{"a": "\ud800"}', r'{"a": "\ud800"}'),
    "a number out of range": ('{"a": 1e999}', '{"a": 1e999}'),
    "more digits than Python reads": ('{"a": ' + "9" * 5000 + "}", '{"a": ' + "9" * 5000 + "}"),
    "deep nesting": ("[" * 5000, "[" * 5000),
    "deep objects": ('{"a":' * 40 + "1" + "}" * 40, '{"a":' * 40 + "1" + "}" * 40),
}


@pytest.mark.parametrize(("text", "shown"), ARGUMENTS.values(), ids=ARGUMENTS)
async def test_a_call_in_the_history_may_have_any_arguments(ask, tokenizer, text, shown):
    response = await ask(messages=called(function={"name": "f", "arguments": text}))
    assert response.status_code == 200, response.text
    assert tokenizer.chats[-1][0][1]["tool_calls"][0]["function"]["arguments"] == shown


async def test_as_many_calls_as_a_model_may_write_are_taken_back(ask):
    calls = [{"id": str(i), "function": {"name": "f", "arguments": "{}"}} for i in range(1000)]
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": calls}]
    assert (await ask(messages=messages)).status_code == 200


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_named_function_is_called_once(ask, engine, chunks_of, is_streamed):
    pytest.importorskip("llguidance")
    named = {"type": "function", "function": {"name": "get_weather"}}
    response = await ask(CALLS["hermes"] * 2, tool_choice=named, stream=is_streamed)
    calls = assembled(chunks_of(response))[2] if is_streamed else choice_of(response)["message"]["tool_calls"]
    assert len(calls) == 1
    await ask(CALLS["hermes"], tool_choice=named, parallel_tool_calls=False)
    once, also_once = (request.sampling_params.grammar for request in engine.requests)
    assert once == also_once


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
async def test_a_call_cannot_be_forced_without_constrained_decoding(ask, error_of, choice, monkeypatch):
    monkeypatch.setattr(grammar, "is_available", lambda: False)
    error = error_of(await ask(tool_choice=choice), 400)
    assert error["param"] == "tool_choice" and "structured" in error["message"]


# -- the official client --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
async def test_the_official_client_reads_calls_whole_and_streamed(engine, tokenizer, make_live, name):
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    engine.reply = f"<think>\nhm\n</think>\n\nI look.\n{CALLS[name]}".encode()
    tokenizer.chat_template = TEMPLATES[name] + "<think>"
    url = f"{make_live().url}/v1"
    options = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
    ) as client:
        whole = await client.chat.completions.create(tools=[WEATHER], tool_choice="auto", **options)
        strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
        async with client.chat.completions.stream(tools=[strict], **options) as stream:
            final = await stream.get_final_completion()
        for completion in (whole, final):
            choice = completion.choices[0]
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "I look."
            (call,) = choice.message.tool_calls
            assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Köln"})
        assert whole.choices[0].message.reasoning_content == "hm"
        # The answer and its result go back in as they came.
        history = [*options["messages"], whole.choices[0].message.model_dump(exclude_none=True)]
        history.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
        engine.reply = b"Rain."
        last = await client.chat.completions.create(model="tiny", messages=history, tools=[WEATHER])
        assert last.choices[0].message.content == "Rain."
    assert tokenizer.chats[-1][0][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Köln"}
