"""Replies of a model, requests to /v1/responses, and what the official client's types check in its answers."""

from __future__ import annotations

import json

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

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


def user(content):
    return {"role": "user", "content": content}


CALL_ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files"}


def custom_call(arguments):
    return f'<tool_call>\n{{"name": "apply_patch", "arguments": {arguments}'
