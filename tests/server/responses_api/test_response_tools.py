"""Tools of /v1/responses, and the items that agents send back."""

from __future__ import annotations

import json

import pytest
from responses import CALL_ITEM, PATCH, TIME, WEATHER, answer_of, custom_call, events_of, user, without_ids

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
