"""/v1/responses, judged by the official client's types: what the model gets to read, and what the client gets back."""

from __future__ import annotations

import json

import msgspec
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

EVENT = TypeAdapter(ResponseStreamEvent)
LOGPROBS = "message.output_text.logprobs"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TIME = {"type": "function", "name": "get_time"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
CALLS = CALL + '\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nHm, a city.\n</think>\n\n"
REPLIES = {
    "words": "Hello, wörld",
    "nothing": "",
    "a call": CALL,
    "words and calls": "Let me see. " + CALLS,
    "a thought and words": THOUGHT + "Sunny.",
    "a thought, words and calls": THOUGHT + "Let me see. " + CALLS,
    "an open thought": "<think>\nHm",
    "no call after all": "<tool_call>\n{'name': 'f'}\n</tool_call>",
}


@pytest.fixture
def respond(engine, tokenizer, make_client):
    """respond(reply, **body) -> response of /v1/responses, from a model that thinks and calls tools."""
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "<tool_call> <think>"

    async def ask(reply="Hello", **body):
        engine.reply = reply.encode()
        return await make_client().post("/v1/responses", json={"input": "Hi"} | body)

    return ask


def answer_of(response):
    assert response.status_code == 200, response.text
    Response.model_validate(response.json(), strict=True)
    return response.json()


def events_of(response):
    """The events of a stream; checks frames, types and numbers."""
    assert response.headers["content-type"].split(";")[0] == "text/event-stream"
    *frames, last = response.text.split("\n\n")
    assert last == ""
    events = []
    for number, frame in enumerate(frames):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        EVENT.validate_python(event, strict=True)
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def without_ids(response):
    """What two answers to one question share."""
    times = {"id": None, "created_at": None, "completed_at": None}
    output = [item | {"id": None} | ({"call_id": None} if "call_id" in item else {}) for item in response["output"]]
    return response | times | {"output": output}


def assembled(events):
    """The output items as a client puts them together out of deltas, each event checked to be in its place."""
    items = []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append({"text": "", "id": event["item"]["id"], "type": event["item"]["type"]})
            continue
        item = items[event["output_index"]]
        assert event["output_index"] == len(items) - 1, "an item begins when the one before has ended"
        assert event.get("item_id", item["id"]) == item["id"]
        if kind.endswith(".delta"):
            assert event["delta"] or event["logprobs"]
            item["text"] += event["delta"]
        elif kind == "output_item.done":
            assert event["item"]["id"] == item["id"]
        elif kind == "content_part.added":
            assert event["part"]["text"] == ""
        else:
            done = event["part"]["text"] if "part" in event else event.get("text", event.get("arguments"))
            assert done == item["text"]
    return items


# -- answers --------------------------------------------------------------------------------------------------


async def test_an_answer_is_a_message_and_repeats_what_was_asked(respond):
    body = {"instructions": "Be kind", "temperature": 0.5, "metadata": {"a": "b"}, "user": "u", "max_output_tokens": 20}
    answer = answer_of(await respond("Hello", **body))
    (item,) = answer["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert body.items() <= answer.items()
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    assert (answer["store"], answer["previous_response_id"], answer["tool_choice"]) == (False, None, "auto")
    usage = answer["usage"]
    assert usage["output_tokens"] == 6
    assert usage["total_tokens"] == usage["input_tokens"] + 6
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
@pytest.mark.parametrize("bound", [None, 1, 20, 60])
async def test_a_stream_ends_in_the_whole_answer_and_its_deltas_add_up_to_it(respond, reply, bound):
    body = {"tools": [WEATHER, TIME], "include": [LOGPROBS], "top_logprobs": 2, "max_output_tokens": bound}
    whole = answer_of(await respond(reply, **body))
    events = events_of(await respond(reply, **body, stream=True))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    texts = [item.get("arguments", "") or "".join(p["text"] for p in item.get("content", [])) for item in done]
    assert [item["text"] for item in assembled(events)] == texts
    for index, item in enumerate(done):
        if item["type"] == "message":
            shown = [e for e in events if e["type"] == "response.output_text.delta" and e["output_index"] == index]
            assert [entry for event in shown for entry in event["logprobs"]] == item["content"][0]["logprobs"]


async def test_thoughts_words_and_calls_are_items_in_their_order(respond):
    answer = answer_of(await respond(REPLIES["a thought, words and calls"], tools=[WEATHER, TIME]))
    thought, message, weather, time = answer["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm, a city."}]
    assert thought["summary"] == []
    assert message["content"][0]["text"] == "Let me see."
    assert (weather["name"], weather["arguments"]) == ("get_weather", '{"city": "Köln"}')
    assert (time["name"], time["arguments"]) == ("get_time", "{}")
    assert weather["call_id"] != time["call_id"]
    assert len({item["id"] for item in answer["output"]}) == 4
    assert {item["status"] for item in answer["output"]} == {"completed"}


async def test_only_the_item_that_was_cut_off_is_incomplete(respond):
    reply = REPLIES["a thought, words and calls"]
    answer = answer_of(await respond(reply, tools=[WEATHER, TIME], max_output_tokens=len(reply.encode()) - 20))
    assert [item["status"] for item in answer["output"]] == ["completed"] * 3 + ["incomplete"]


async def test_a_thought_to_be_sent_back_comes_in_the_open_whether_encrypted_or_not(respond):
    asked = {"include": ["reasoning.encrypted_content"], "store": False}
    response = await respond(THOUGHT + "Sunny.", **asked)
    thought, message = answer_of(response)["output"]
    assert thought["content"][0]["text"] == "Hm, a city." and message["content"][0]["logprobs"] == []
    assert "encrypted_content" not in thought
    assert response.headers["x-ignored-parameters"] == "include.reasoning.encrypted_content"
    again = await respond("Sunny.", input=[{"role": "user", "content": "Hi"}, thought, message], **asked)
    assert answer_of(again)["status"] == "completed"


async def test_reasoning_tokens_are_those_up_to_the_end_of_the_thought(respond):
    details = answer_of(await respond(THOUGHT + "Sunny."))["usage"]["output_tokens_details"]
    assert details == {"reasoning_tokens": len(THOUGHT.rstrip())}


@pytest.mark.parametrize(
    ("asked", "texts"), [({}, ["a\n\nb", "Yes."]), ({"stop_in_reasoning": True}, ["a"])], ids=["answer", "whole"]
)
async def test_stop_strings_end_the_answer_and_not_the_thought(respond, asked, texts):
    reply = "<think>\na\n\nb\n</think>\n\nYes.\n\nNo."
    answer = answer_of(await respond(reply, stop="\n\n", **asked))
    assert [item["content"][0]["text"] for item in answer["output"]] == texts
    assert answer["usage"]["output_tokens"] == reply.index("No.") if len(texts) > 1 else len("<think>\na\n\n")
    events = events_of(await respond(reply, stop="\n\n", stream=True, **asked))
    assert without_ids(events[-1]["response"]) == without_ids(answer)


async def test_an_answer_that_is_cut_off_is_incomplete(respond):
    answer = answer_of(await respond("Hello", max_output_tokens=2))
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["text"] == "He"


async def test_an_answer_without_a_word_is_an_empty_message(respond):
    (item,) = answer_of(await respond(""))["output"]
    assert item["content"][0]["text"] == ""


async def test_log_probabilities_come_for_every_token(respond):
    answer = answer_of(await respond("Hello", include=[LOGPROBS], top_logprobs=2))
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == [*"Hello", "</s>"]
    assert {len(entry["top_logprobs"]) for entry in logprobs} == {2}


async def test_one_call_only_without_parallel_calls(respond):
    answer = answer_of(await respond(CALLS, tools=[WEATHER, TIME], parallel_tool_calls=False))
    assert [item["name"] for item in answer["output"]] == ["get_weather"]
    assert answer["parallel_tool_calls"] is False


async def test_a_failure_in_mid_stream_is_an_error_and_a_failed_response(respond, engine):
    engine.die_after = 3
    *_, error, failed = events_of(await respond("Hello", stream=True))
    assert (error["type"], error["code"]) == ("error", "engine_dead")
    assert failed["type"] == "response.failed"
    response = failed["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    assert response["output"][0]["content"][0]["text"] == "Hel"
    assert response["output"][0]["status"] == "incomplete"


async def test_a_failure_before_the_first_token_has_its_status(respond, engine, error_of):
    engine.queue_bound = 0
    assert error_of(await respond(stream=True), 429)["code"] == "rate_limit_exceeded"


# -- requests -------------------------------------------------------------------------------------------------


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
async def test_what_is_documented_and_not_served_is_refused_by_name(respond, error_of, name):
    error = error_of(await respond(**{name: REFUSED[name]}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


async def test_a_refusal_in_the_history_is_what_the_assistant_said(respond, engine):
    part = {"type": "refusal", "refusal": "No."}
    said = {"type": "message", "role": "assistant", "content": [part]}
    assert (await respond(input=[{"role": "user", "content": "u"}, said])).status_code == 200
    assert bytes(i for i in engine.requests[0].prompt_token_ids if i < 256) == b"uNo."


async def test_a_refusal_shows_what_asks_for_nothing_as_json(respond, error_of):
    error = error_of(await respond(stream_options={"include_usage": True}), 400)
    assert error["message"].endswith('send {} or {"include_obfuscation": false}')


async def test_what_nobody_documents_is_listed(respond):
    items = [{"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}], "y": 2}]
    response = await respond(input=items, zzz=1, text={"w": 1}, tools=[WEATHER | {"strict": True, "v": 1}])
    answer_of(response)
    listed = response.headers["x-ignored-parameters"].split(", ")
    assert sorted(listed) == ["input[].content[].x", "input[].y", "text.w", "tools[].strict", "tools[].v", "zzz"]


def user(content):
    return {"role": "user", "content": content}


CALL_ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
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


# -- tools and items of agents ---------------------------------------------------------------------------------

PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files"}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
BUILT_IN = [
    {"type": "web_search"},
    {"type": "web_search_preview", "search_context_size": "low"},
    {"type": "file_search", "vector_store_ids": ["v"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "image_generation"},
    {"type": "computer_use_preview", "display_width": 1, "display_height": 1, "environment": "browser"},
    {"type": "mcp", "server_label": "m", "server_url": "https://example.com"},
    {"type": "local_shell"},
    {"type": "namespace", "name": "crm", "description": "d", "tools": [TIME]},
]
PATCHES = {
    "lines": ('*** Begin\n+a "b" \\ ü😀\n', None),
    "nothing": ("", None),
    "cut off": ("*** Beg", '{"input": "*** Beg'),
    "another key": ('{"patch": "x"}', '{"patch": "x"}'),
    "the key is late": ("x", '{"why": "' + "y" * 100 + '", "input": "x"}'),
}


def custom_call(arguments):
    return f'<tool_call>\n{{"name": "apply_patch", "arguments": {arguments}'


async def test_built_in_tools_are_left_out_and_named(respond, tokenizer):
    response = await respond(tools=[*BUILT_IN[:4], WEATHER, *BUILT_IN[4:]])
    answer = answer_of(response)
    listed = response.headers["x-ignored-parameters"].split(", ")
    assert listed == [f"tools[].{tool['type']}" for tool in BUILT_IN]
    assert [tool["function"]["name"] for tool in tokenizer.chats[-1][1]] == ["get_weather"]
    assert [tool["type"] for tool in answer["tools"]] == ["function"]
    assert answer_of(await respond(tools=BUILT_IN))["tools"] == []


@pytest.mark.parametrize(("text", "arguments"), PATCHES.values(), ids=PATCHES)
async def test_a_custom_tool_is_called_with_text(respond, tokenizer, text, arguments):
    reply = "I edit. " + custom_call(arguments or json.dumps({"input": text}) + "}\n</tool_call>")
    body = {"tools": [WEATHER, PATCH], "input": [user("Hi")]}
    answer = answer_of(await respond(reply, **body))
    message, call = answer["output"]
    assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "apply_patch", text)
    assert answer["tools"][1] == PATCH
    parameters = tokenizer.chats[-1][1][1]["function"]["parameters"]
    assert (list(parameters["properties"]), parameters["required"]) == (["input"], ["input"])
    events = events_of(await respond(reply, **body, stream=True))
    assert without_ids(events[-1]["response"]) == without_ids(answer)
    own = [event for event in events if event["type"].startswith("response.custom_tool_call_input.")]
    assert "".join(event["delta"] for event in own[:-1]) == own[-1]["input"] == text
    output = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "done"}
    again = await respond("Fine.", **body | {"input": [user("Hi"), message, call, output]})
    assert "x-ignored-parameters" not in again.headers
    _, shown, result = tokenizer.chats[-1][0]
    assert shown["tool_calls"][0]["function"] == {"name": "apply_patch", "arguments": {"input": text}}
    assert (result["content"], result["tool_call_id"]) == ("done", call["call_id"])


async def test_a_custom_tools_grammar_is_told_to_the_model(respond, tokenizer):
    response = await respond(tools=[PATCH | {"format": GRAMMAR}])
    assert response.headers["x-ignored-parameters"] == "tools[].format"
    text = tokenizer.chats[-1][1][0]["function"]["parameters"]["properties"]["input"]
    assert text["description"].endswith("lark grammar:\nstart: /.+/")
    assert "x-ignored-parameters" not in (await respond(tools=[PATCH | {"format": {"type": "text"}}])).headers


async def test_a_custom_tool_can_be_forced(respond, engine):
    pytest.importorskip("llguidance")
    answer_of(await respond(tools=[WEATHER, PATCH], tool_choice={"type": "custom", "name": "apply_patch"}))
    grammar = engine.requests[-1].sampling_params.grammar
    assert "apply_patch" in grammar and '"input"' in grammar and "get_weather" not in grammar


async def test_items_of_tools_that_are_not_here_are_left_out_and_named(respond, tokenizer):
    items = [
        user("x"),
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "q"}},
        {"type": "mcp_list_tools", "id": "m", "server_label": "s", "tools": []},
        {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "gAAA"},
        {"role": "assistant", "content": "y"},
    ]
    response = await respond(input=items, include=["reasoning.encrypted_content", "web_search_call.action.sources"])
    answer_of(response)
    assert response.headers["x-ignored-parameters"].split(", ") == [
        "input[].web_search_call",
        "input[].mcp_list_tools",
        "input[].encrypted_content",
        "include.reasoning.encrypted_content",
        "include.web_search_call.action.sources",
    ]
    assert [message["content"] for message in tokenizer.chats[-1][0]] == ["x", "y"]


async def test_calls_that_a_client_ran_are_shown_as_calls(respond, tokenizer):
    action, operation = {"type": "exec", "command": ["ls"]}, {"type": "delete_file", "path": "a"}
    items = [
        user("x"),
        {"type": "local_shell_call", "id": "l1", "call_id": "c1", "action": action, "status": "completed"},
        {"type": "local_shell_call_output", "id": "c1", "output": "a b"},
        {"type": "local_shell_call_output", "id": "o1", "call_id": "c1", "output": "c"},
        {"type": "shell_call", "call_id": "c2", "action": {"commands": ["ls"]}, "status": "completed"},
        {"type": "shell_call_output", "call_id": "c2", "output": [{"stdout": "a", "stderr": ""}]},
        {"type": "apply_patch_call", "call_id": "c3", "operation": operation, "status": "completed"},
        {"type": "apply_patch_call_output", "call_id": "c3", "status": "failed"},
        CALL_ITEM | {"namespace": "crm"},
    ]
    response = await respond(input=items)
    answer_of(response)
    assert response.headers["x-ignored-parameters"] == "input[].namespace"
    messages = tokenizer.chats[-1][0]
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    assert [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls[:3]] == [
        ("c1", "local_shell", action),
        ("c2", "shell", {"commands": ["ls"]}),
        ("c3", "apply_patch", operation),
    ]
    results = [(message["tool_call_id"], message["content"]) for message in messages if message["role"] == "tool"]
    assert results == [("c1", "a b"), ("c1", "c"), ("c2", '[{"stdout": "a", "stderr": ""}]'), ("c3", "failed")]


@pytest.mark.parametrize("content", [[], [{"type": "reasoning_text", "text": "Long"}]])
async def test_a_summary_stands_for_a_thought_that_is_not_there(respond, tokenizer, content):
    summary = [{"type": "summary_text", "text": "Short"}, {"type": "summary_text", "text": "er"}]
    thought = {"type": "reasoning", "id": "rs", "summary": summary, "content": content}
    response = await respond(input=[user("x"), thought, {"role": "assistant", "content": "y"}])
    answer_of(response)
    assert response.headers.get("x-ignored-parameters") == ("input[].summary" if content else None)
    assert tokenizer.chats[-1][0][1] == {
        "role": "assistant",
        "content": "y",
        "reasoning_content": "Long" if content else "Short\ner",
    }


async def test_an_effort_reaches_the_template_that_reads_one(respond, tokenizer):
    asked = {"reasoning": {"effort": "low", "summary": "auto"}}
    response = await respond(**asked)
    assert answer_of(response)["reasoning"] == {"effort": "low", "summary": None}
    assert response.headers["x-ignored-parameters"] == "reasoning.summary, reasoning.effort"
    tokenizer.chat_template += "{{ reasoning_effort }}{{ tone }}"
    response = await respond(**asked, chat_template_kwargs={"tone": "kind"})
    assert response.headers["x-ignored-parameters"] == "reasoning.summary"
    assert tokenizer.template_kwargs == {"reasoning_effort": "low", "tone": "kind"}


# -- the official client --------------------------------------------------------------------------------------


@pytest.fixture
async def official(engine, tokenizer, make_live):
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "<tool_call> <think>"
    engine.reply = REPLIES["a thought, words and calls"].encode()
    async with openai.AsyncOpenAI(
        base_url=f"{make_live().url}/v1", api_key="x", max_retries=0, timeout=20, _strict_response_validation=True
    ) as client:
        yield client


async def test_the_clients_stream_helper_gives_what_create_gives(official):
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
