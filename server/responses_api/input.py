"""The `input` of a response -> chat messages, and the field of the body that each field of a message came from."""

from __future__ import annotations

import json
from typing import Any

from ...engine.errors import RequestError
from ..door.body import drop_nulls, json_type, require_type, shown
from ..door.fields import refuse_unless_neutral
from ..door.messages import MAX_MESSAGES, MAX_PARTS, PART_SEPARATOR, refuse_media
from ..errors import UnsupportedParameterError
from ..parsers.custom_input import INPUT

MAX_ITEMS = MAX_MESSAGES
MESSAGE_ROLES = ("user", "assistant", "system", "developer")
CALL_TYPES = ("function_call", "custom_tool_call")
# Calls that the client ran, of tools that OpenAI's models know without a definition -> the field with the order.
CLIENT_CALLS = {"local_shell_call": "action", "shell_call": "action", "apply_patch_call": "operation"}
OUTPUT_TYPES = ("function_call_output", "custom_tool_call_output", *(f"{kind}_output" for kind in CLIENT_CALLS))
ITEM_TYPES = ("message", *CALL_TYPES, *CLIENT_CALLS, *OUTPUT_TYPES, "reasoning")
# Items that tools of OpenAI's servers leave in a history. The answer that follows has their result.
LEFT_OUT = (
    "code_interpreter_call",
    "computer_call",
    "computer_call_output",
    "file_search_call",
    "image_generation_call",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
)
TEXT_TYPES = ("input_text", "output_text")
# Fields that clients send back as they got them. They change nothing.
ECHOES = frozenset({"type", "id", "status", "annotations", "logprobs"})
ITEM_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "async": (False,),
    "caller": ({"type": "direct"},),
}
# Fields of chat -> fields of a response.
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.function": "tool_choice",
    "reasoning_effort": "reasoning.effort",
}


class FieldNames:
    """Fields of the chat request -> the fields of the body that they were made of."""

    def __init__(self) -> None:
        self._origins = dict(NAMES)

    def note(self, chat_field: str, origin: str) -> None:
        self._origins[chat_field] = origin

    def of(self, chat_field: str) -> str:
        """The body's name of `chat_field`, by its longest beginning that has an origin."""
        for end in range(len(chat_field), 0, -1):
            origin = self._origins.get(chat_field[:end])
            if origin is not None:
                return origin + chat_field[end:]
        return chat_field

    def renamed(self, error: RequestError) -> RequestError:
        """The same error, with the name of the field that the client sent."""
        if error.param is None:
            return error
        param = self.of(error.param)
        return type(error)(str(error).replace(error.param, param), param)


class Conversation:
    """Chat messages, made item by item. Consecutive thoughts, texts and calls become one message of the assistant."""

    def __init__(self, names: FieldNames) -> None:
        self.messages: list[dict[str, Any]] = []
        self.unknown: dict[str, None] = {}  # names of undocumented fields, in order
        self._names = names

    def add_text(self, role: str, text: str, where: str) -> None:
        self._new({"role": role, "content": text}, where, where)

    def add_items(self, value: Any) -> None:
        """Raises `RequestError`. Faults that chat messages can have, too, are left to `messages.read_messages`."""
        if not isinstance(value, list):
            raise RequestError(f"input must be a string or a list of items, got {json_type(value)}", "input")
        if not 0 < len(value) <= MAX_ITEMS:
            raise RequestError(f"input must have 1 to {MAX_ITEMS} items, got {len(value)}", "input")
        for index, entry in enumerate(value):
            where = f"input[{index}]"
            self._add_item(drop_nulls(require_type(entry, dict, where)), where)

    def _add_item(self, item: dict[str, Any], where: str) -> None:
        kind = item.get("type", "message")
        if not isinstance(kind, str):
            raise _unsupported(kind, ITEM_TYPES, f"{where}.type")
        if kind == "message":
            self._add_message(item, where)
        elif kind in CALL_TYPES:
            self._add_call(item, where)
        elif kind in CLIENT_CALLS:
            arguments = json.dumps(item.get(CLIENT_CALLS[kind]), ensure_ascii=False)
            call = {"call_id": item.get("call_id"), "name": kind.removesuffix("_call"), "arguments": arguments}
            self._add_call(call, where)
        elif kind in OUTPUT_TYPES:
            self._add_output(item, where)
        elif kind == "reasoning":
            self._add_reasoning(item, where)
        elif kind in LEFT_OUT:
            self.unknown[f"input[].{kind}"] = None
        else:
            raise _unsupported(kind, ITEM_TYPES, f"{where}.type")

    def _add_message(self, item: dict[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in MESSAGE_ROLES:
            roles = ", ".join(MESSAGE_ROLES)
            raise RequestError(f"{where}.role must be one of {roles}, got {shown(role)}", f"{where}.role")
        self._check_fields(item, ("role", "content"), where)
        types = (*TEXT_TYPES, "refusal") if role == "assistant" else TEXT_TYPES
        content = self._text_parts(item.get("content"), types, f"{where}.content")
        last = self.messages[-1] if self.messages else {}
        if role == "assistant" and "reasoning_content" in last and not (last["content"] or "tool_calls" in last):
            last["content"] = content
            self._note("content", f"{where}.content")
        else:
            self._new({"role": role, "content": content}, where, f"{where}.content")

    def _add_reasoning(self, item: dict[str, Any], where: str) -> None:
        """A thought by its content, else by its summary. Encrypted content cannot be read."""
        self._check_fields(item, ("content", "summary"), where)
        thought = self._thought(item, "content", "reasoning_text", where)
        summary = self._thought(item, "summary", "summary_text", where)
        if thought and summary:
            self.unknown["input[].summary"] = None
        if thought := thought or summary:
            self._new({"role": "assistant", "content": "", "reasoning_content": thought}, where, where)

    def _thought(self, item: dict[str, Any], name: str, kind: str, where: str) -> str:
        where = f"{where}.{name}"
        parts = require_type(self._text_parts(item.get(name, []), (kind,), where), list, where)
        for index, part in enumerate(parts):
            require_type(part["text"], str, f"{where}[{index}].text")
        return PART_SEPARATOR.join(part["text"] for part in parts)

    def _add_call(self, item: dict[str, Any], where: str) -> None:
        self._check_fields(item, ("call_id", "name", "arguments", "input"), where)
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._new({"role": "assistant", "content": ""}, where, where)
        calls = self.messages[-1].setdefault("tool_calls", [])
        field = f"tool_calls[{len(calls)}]"
        self._note(field, where)
        self._note(f"{field}.id", f"{where}.call_id")
        self._note(f"{field}.function", where)
        arguments = item.get("arguments")
        if item.get("type") == "custom_tool_call":
            text = require_type(item.get("input"), str, f"{where}.input")
            arguments = json.dumps({INPUT: text}, ensure_ascii=False)
        function = {"name": item.get("name"), "arguments": arguments}
        calls.append({"id": item.get("call_id"), "type": "function", "function": function})

    def _add_output(self, item: dict[str, Any], where: str) -> None:
        self._check_fields(item, ("call_id", "output", "name"), where)
        kind = item["type"]
        call_id = item.get("call_id")
        if call_id is None and kind == "local_shell_call_output":  # OpenAI's document gives it an id only
            call_id = item.get("id")
        if call_id is None:
            raise RequestError(f"{where}.call_id is required", f"{where}.call_id")
        output = item.get("output", item.get("status") if kind == "apply_patch_call_output" else None)
        if kind == "shell_call_output":  # a list of the commands' outputs and endings
            output = json.dumps(output, ensure_ascii=False)
        content = self._text_parts(output, TEXT_TYPES, f"{where}.output")
        message = {"role": "tool", "tool_call_id": call_id, "content": content}
        if "name" in item:
            message["name"] = item["name"]
        self._new(message, where, f"{where}.output")
        self._note("tool_call_id", f"{where}.call_id")

    def _text_parts(self, content: Any, types: tuple[str, ...], where: str) -> Any:
        """A list of parts as chat has them; any other content as it is. Raises `RequestError`."""
        if not isinstance(content, list):
            return content
        if len(content) > MAX_PARTS:
            raise RequestError(f"{where} must have at most {MAX_PARTS} parts, got {len(content)}", where)
        parts = []
        for index, part in enumerate(content):
            field = f"{where}[{index}]"
            refuse_media(require_type(part, dict, field).get("type"), f"{field}.type")
            if part.get("type") not in types:
                raise _unsupported(part.get("type"), types, f"{field}.type")
            kind = "refusal" if part["type"] == "refusal" else "text"
            self._check_fields(drop_nulls(part), (kind,), field)
            parts.append({"type": kind, kind: part.get(kind)})
        return parts

    def _check_fields(self, entry: dict[str, Any], served: tuple[str, ...], where: str) -> None:
        for name, value in entry.items():
            if name in served or name in ECHOES:
                continue
            if name in ITEM_NEUTRAL_VALUES:
                refuse_unless_neutral(f"{where}.{name}", value, ITEM_NEUTRAL_VALUES[name])
            else:
                self.unknown[f"{_without_indices(where)}.{name}"] = None

    def _new(self, message: dict[str, Any], where: str, content: str) -> None:
        self.messages.append(message)
        self._names.note(f"messages[{len(self.messages) - 1}]", where)
        self._note("content", content)

    def _note(self, field: str, origin: str) -> None:
        self._names.note(f"messages[{len(self.messages) - 1}].{field}", origin)


def _unsupported(kind: Any, types: tuple[str, ...], where: str) -> UnsupportedParameterError:
    return UnsupportedParameterError(f"{where} must be one of {', '.join(types)}, got {shown(kind)}", where)


def _without_indices(where: str) -> str:
    """`input[3].content[0]` -> `input[].content[]`."""
    return "".join(part.split("[")[0] + "[]" * ("[" in part) for part in where.replace(".", "\n.").split("\n"))
