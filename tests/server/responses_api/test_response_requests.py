"""The requests to /v1/responses: the chat that the model reads, and errors by the client's names of fields."""

from __future__ import annotations

import pytest
from responses import CALL_ITEM, LOGPROBS, REPLIES, TIME, WEATHER, answer_of, user


async def test_items_become_the_messages_of_a_chat(respond, tokenizer):
    items = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Let me see", "annotations": [], "logprobs": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "get_weather",
            "arguments": '{"city": "Köln"}',
        },
        {"type": "function_call", "call_id": "c2", "name": "get_time", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny", "name": "get_weather"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "noon"}]},
        {"type": "message", "role": "assistant", "content": "Done"},
        {"role": "assistant", "content": "Really"},
        {"role": "user", "content": "Thanks"},
    ]
    response = await respond(input=items, instructions="Be kind", tools=[WEATHER])
    answer_of(response)
    assert "x-ignored-parameters" not in response.headers
    messages, tools = tokenizer.chats[-1]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}},
        {"id": "c2", "type": "function", "function": {"name": "get_time", "arguments": {}}},
    ]
    assert messages == [
        {"role": "system", "content": "Be kind"},
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "Let me see", "reasoning_content": "Hm", "tool_calls": calls},
        {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "get_weather"},
        {"role": "tool", "content": "noon", "tool_call_id": "c2"},
        {"role": "assistant", "content": "Done"},
        {"role": "assistant", "content": "Really"},
        {"role": "user", "content": "Thanks"},
    ]
    assert tools == [{"type": "function", "function": {name: WEATHER[name] for name in WEATHER if name != "type"}}]


async def test_a_thought_belongs_to_the_first_message_after_it_alone(respond, tokenizer):
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]}
    words = [{"role": "assistant", "content": text} for text in ("a", "b")]
    answer_of(await respond(input=[user("x"), thought, *words, thought, CALL_ITEM, words[0], thought, user("y")]))
    found = [(m.get("reasoning_content"), m["content"], "tool_calls" in m) for m in tokenizer.chats[-1][0]]
    assert found == [
        (None, "x", False),
        ("Hm", "a", False),
        (None, "b", False),
        ("Hm", "", True),
        (None, "a", False),
        ("Hm", "", False),
        (None, "y", False),
    ]


async def test_an_answer_can_be_sent_back_as_it_came(respond, tokenizer):
    output = answer_of(await respond(REPLIES["a thought, words and calls"], tools=[WEATHER, TIME]))["output"]
    response = await respond(input=[{"role": "user", "content": "Hi"}, *output], tools=[WEATHER, TIME])
    answer_of(response)
    assert "x-ignored-parameters" not in response.headers
    message = tokenizer.chats[-1][0][1]
    assert (message["reasoning_content"], message["content"]) == ("Hm, a city.", "Let me see.")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather", "get_time"]


async def test_sampling_parameters_reach_the_engine(respond, engine):
    fields = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": 3, "repetition_penalty": 1.5}
    answer_of(await respond(**fields, stop="x", max_output_tokens=9))
    params = engine.requests[-1].sampling_params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.max_tokens) == (("x",), 9)


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
HELD = {
    "a schema": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ),
    "an object": (
        {"text": {"format": {"type": "json_object"}}},
        {"response_format": {"type": "json_object"}},
    ),
    "a call": (
        {"tools": [WEATHER, TIME], "tool_choice": {"type": "function", "name": "get_time"}},
        {
            "tools": [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}],
            "tool_choice": {"type": "function", "function": {"name": "get_time"}},
        },
    ),
}


@pytest.mark.parametrize(("body", "chat_body"), HELD.values(), ids=HELD)
async def test_an_answer_is_held_to_the_form_that_a_chat_would_have(respond, client, engine, body, chat_body):
    pytest.importorskip("llguidance")
    answer = answer_of(await respond(**body))
    assert all(answer[name] == body[name] for name in ("text", "tool_choice") if name in body)
    messages = [{"role": "user", "content": "Hi"}]
    await client.post("/v1/chat/completions", json={"messages": messages} | chat_body)
    first, second = (request.sampling_params.grammar for request in engine.requests)
    assert first == second is not None


NEUTRAL = {
    "store": False,
    "background": False,
    "truncation": "disabled",
    "service_tier": "auto",
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "reasoning": {},
    "previous_response_id": None,
    "stream_options": {"include_obfuscation": False},
    "tool_choice": "auto",
    "include": [],
    "safety_identifier": "x",
    "prompt_cache_key": "y",
}


async def test_values_that_ask_for_nothing_are_taken(respond):
    response = await respond(**NEUTRAL)
    answer_of(response)
    assert "x-ignored-parameters" not in response.headers


REFUSED = {
    "store": True,
    "background": True,
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
    "prompt": {"id": "p"},
    "truncation": "auto",
    "max_tool_calls": 1,
    "service_tier": "flex",
    "context_management": [{"type": "compaction"}],
    "messages": [],
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "n": 2,
    "suffix": "x",
    "logprobs": True,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "x"},
}


@pytest.mark.parametrize("name", REFUSED)
async def test_documented_field_that_is_not_served_is_refused_by_name_in_responses(respond, error_of, name):
    error = error_of(await respond(**{name: REFUSED[name]}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


async def test_refusal_in_the_history_is_text_of_the_assistant(respond, engine):
    part = {"type": "refusal", "refusal": "No."}
    said = {"type": "message", "role": "assistant", "content": [part]}
    assert (await respond(input=[{"role": "user", "content": "u"}, said])).status_code == 200
    assert bytes(i for i in engine.requests[0].prompt_token_ids if i < 256) == b"uNo."


async def test_error_shows_neutral_values_as_json(respond, error_of):
    error = error_of(await respond(stream_options={"include_usage": True}), 400)
    assert error["message"].endswith('send {} or {"include_obfuscation": false}')


async def test_undocumented_field_of_a_response_is_listed(respond):
    items = [{"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}], "y": 2}]
    response = await respond(input=items, zzz=1, text={"w": 1}, tools=[WEATHER | {"strict": True, "v": 1}])
    answer_of(response)
    listed = response.headers["x-ignored-parameters"].split(", ")
    assert sorted(listed) == ["input[].content[].x", "input[].y", "text.w", "tools[].strict", "tools[].v", "zzz"]


WRONG = [
    ({"input": None}, "input"),
    ({"input": 1}, "input"),
    ({"input": []}, "input"),
    ({"input": "x" * 60_000}, "input"),
    ({"input": [{"role": "user", "content": ""}] * 4097}, "input"),
    ({"input": [user([{"type": "input_text", "text": ""}] * 4097)]}, "input[0].content"),
    ({"input": [1]}, "input[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [user("x"), user(1)]}, "input[1].content"),
    ({"input": [user([1])]}, "input[0].content[0]"),
    ({"input": [user([{"type": "input_image", "image_url": "x"}])]}, "input[0].content[0].type"),
    ({"input": [user([{"type": "input_text", "text": "a"}, {"type": "input_text"}])]}, "input[0].content[1].text"),
    ({"input": [CALL_ITEM | {"arguments": {}}], "instructions": "x"}, "input[0].arguments"),
    ({"input": [user("x"), CALL_ITEM, CALL_ITEM | {"call_id": ""}]}, "input[2].call_id"),
    ({"input": [user("x"), CALL_ITEM, CALL_ITEM | {"name": "a b"}]}, "input[2].name"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": 1, "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": 1}]}, "input[0].output"),
    ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text"}]}]}, "input[0].summary[0].text"),
    ({"input": [{"type": "reasoning", "summary": [{"type": "text"}]}]}, "input[0].summary[0].type"),
    ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input[0].type"),
    ({"input": [{"type": ["message"]}]}, "input[0].type"),
    ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f", "input": 1}]}, "input[0].input"),
    ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f g", "input": ""}]}, "input[0].name"),
    ({"input": [{"type": "shell_call", "action": {}}]}, "input[0].call_id"),
    ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
    ({"reasoning": "high"}, "reasoning"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ({"tools": [{"type": "web_search"}, {"type": "function"}]}, "tools[1].name"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tools": [{"type": "custom"}]}, "tools[0].name"),
    ({"tools": [{"type": "custom", "name": "f", "format": 1}]}, "tools[0].format"),
    ({"tools": [{"type": "custom", "name": "f", "format": {"type": "grammar", "syntax": 1}}]}, "tools[0].format"),
    ({"tools": [{"type": ["function"], "name": "f"}]}, "tools[0].type"),
    ({"input": [{"type": "reasoning", "content": [{"type": "reasoning_text"}]}]}, "input[0].content[0].text"),
    ({"instructions": 1}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 4096}, "max_output_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"top_logprobs": 21, "include": [LOGPROBS]}, "top_logprobs"),
    ({"include": ["reasoning.encrypted_content", "x"]}, "include[1]"),
    ({"top_logprobs": 2, "include": ["reasoning.encrypted_content"]}, "top_logprobs"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"text": {"format": 1}}, "text.format"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}}, "text.format.schema"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": {"uniqueItems": True}}}},
        "text.format.schema.uniqueItems",
    ),
    ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": 1}}}, "text.format.schema"),
    ({"tools": 1}, "tools"),
    ({"tools": [1]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    ({"tools": [WEATHER | {"parameters": 1}]}, "tools[0].parameters"),
    ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [WEATHER], "tool_choice": 1}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
    ({"tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=[f"{param}-{i}" for i, (_, param) in enumerate(WRONG)])
async def test_an_error_names_the_field_that_the_client_sent(respond, error_of, body, param):
    error = error_of(await respond(**body), 400)
    assert error["param"] == param
    for chats in ("messages", "max_completion_tokens", "response_format", "function.name", "max_tokens"):
        assert chats not in error["message"]


@pytest.mark.parametrize("kind", ["web_search", "allowed_tools"])
async def test_a_choice_of_another_type_names_both_types_that_are_served(respond, error_of, kind):
    error = error_of(await respond(tools=[WEATHER], tool_choice={"type": kind}), 400)
    assert error["message"].startswith(f"tool_choice.type must be 'function' or 'custom', got '{kind}'")


async def test_a_form_and_a_call_that_has_to_be_made_reach_the_engine(engine, respond):
    schema = {"type": "object", "properties": {"sky": {"type": "string"}}, "additionalProperties": False}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    assert (await respond(text={"format": form})).status_code == 200
    assert (await respond(tools=[WEATHER], tool_choice="required")).status_code == 200
    form, call = (request.sampling_params.grammar for request in engine.requests)
    assert '"sky"' in form and "get_weather" in call
