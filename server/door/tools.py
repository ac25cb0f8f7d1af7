"""Tools of a chat request: any JSON -> the plain dicts that a chat template reads, and the choice among them.

Calls of earlier answers, which clients send back in assistant messages, are read here, too.
"""

from __future__ import annotations

import json
from typing import Any

from ...engine.errors import RequestError
from ..errors import UnsupportedParameterError
from ..wire.requests import ToolChoice
from ..wire.schemas import FUNCTION_NAME, MAX_TOOLS
from .body import MAX_SHOWN_CHARS, drop_nulls, parse_object, require_type, shown

MAX_ARGUMENTS_DEPTH = 32
MAX_TOOL_CHARS = 65_536  # of one definition, as JSON
MAX_ID_CHARS = 256
STRICT = "function.strict"
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}  # OpenAI's default


def read_tools(value: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Tools as templates read them, and the names of the fields that change nothing. Raises `RequestError`."""
    entries = require_type(value, list, "tools")
    if len(entries) > MAX_TOOLS:
        raise RequestError(f"tools must have at most {MAX_TOOLS} entries, got {len(entries)}", "tools")
    tools: list[dict[str, Any]] = []
    seen: set[str] = set()
    unknown: dict[str, None] = {}
    for index, entry in enumerate(entries):
        where = f"tools[{index}]"
        function, names = _read_function(drop_nulls(require_type(entry, dict, where)), where)
        unknown.update(dict.fromkeys(f"tools[].{name}" for name in names))
        if function["name"] in seen:
            raise RequestError(f"{where}.function.name {function['name']!r} is there twice", f"{where}.function.name")
        seen.add(function["name"])
        tools.append({"type": "function", "function": function})
    return tools, list(unknown)


def strict_functions(tools: list[dict[str, Any]]) -> frozenset[str]:
    """The names of functions whose arguments must follow the whole schema. `tools`: as sent, after `read_tools`."""
    functions = [tool["function"] for tool in tools if tool.get("type") == "function"]
    return frozenset(function["name"] for function in functions if function.get("strict"))


def read_tool_choice(value: Any, tools: list[dict[str, Any]]) -> ToolChoice:
    """Raises `RequestError` for a choice that these tools do not allow."""
    if value is None:
        return ToolChoice("auto" if tools else "none")
    if isinstance(value, dict):
        return ToolChoice("required", _read_named(drop_nulls(value), tools))
    if value not in ("none", "auto", "required"):
        allowed = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
        raise RequestError(f"tool_choice must be {allowed}, got {shown(value)}", "tool_choice")
    if value == "required" and not tools:
        raise RequestError("tool_choice 'required' needs a function among the tools", "tool_choice")
    return ToolChoice(value if tools else "none")


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of an assistant message, in any number. Raises `RequestError`.

    The arguments of a call are an object if their text is one in JSON, else the text.
    """
    entries = require_type(value, list, where)
    return [_read_call(require_type(entry, dict, f"{where}[{i}]"), f"{where}[{i}]") for i, entry in enumerate(entries)]


def _read_function(entry: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    _require_function_type(entry, where)
    given = drop_nulls(require_type(entry.get("function"), dict, f"{where}.function"))
    function: dict[str, Any] = {"name": _read_name(given.get("name"), f"{where}.function.name")}
    if "description" in given:
        function["description"] = require_type(given["description"], str, f"{where}.function.description")
    function["parameters"] = require_type(given.get("parameters", NO_PARAMETERS), dict, f"{where}.function.parameters")
    num_chars = len(json.dumps(function, ensure_ascii=False))
    if num_chars > MAX_TOOL_CHARS:
        raise RequestError(f"{where} must have at most {MAX_TOOL_CHARS} characters as JSON, got {num_chars}", where)
    unknown = [name for name in entry if name not in ("type", "function")]
    unknown += [f"function.{name}" for name in given if name not in ("name", "description", "parameters", "strict")]
    if require_type(given.get("strict", False), bool, f"{where}.function.strict"):
        unknown.append(STRICT)  # `answer_grammar` takes it back if a grammar holds the arguments
    return function, unknown


def _read_named(value: dict[str, Any], tools: list[dict[str, Any]]) -> str:
    if value.get("type") != "function":
        found = repr(value.get("type"))[:MAX_SHOWN_CHARS]
        raise UnsupportedParameterError(f"tool_choice.type must be 'function', got {found}", "tool_choice.type")
    function = require_type(value.get("function"), dict, "tool_choice.function")
    name = _read_name(function.get("name"), "tool_choice.function.name")
    if name not in (tool["function"]["name"] for tool in tools):
        raise RequestError(f"tool_choice names {name!r}, which is none of the tools", "tool_choice.function.name")
    return name


def _read_call(entry: dict[str, Any], where: str) -> dict[str, Any]:
    _require_function_type({"type": "function"} | drop_nulls(entry), where)
    call_id = require_type(entry.get("id"), str, f"{where}.id")
    if not 0 < len(call_id) <= MAX_ID_CHARS:
        raise RequestError(f"{where}.id must have 1 to {MAX_ID_CHARS} characters, got {len(call_id)}", f"{where}.id")
    function = require_type(entry.get("function"), dict, f"{where}.function")
    name = _read_name(function.get("name"), f"{where}.function.name")
    arguments = _read_arguments(function.get("arguments"), f"{where}.function.arguments")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _read_arguments(value: Any, where: str) -> dict[str, Any] | str:
    """Takes any text: a model may make a mistake or be cut off, and its answer must still be valid history."""
    text: str = require_type(value, str, where)
    if not text.strip():
        return {}  # some clients send a call without arguments so
    try:
        return parse_object(text.encode(), MAX_ARGUMENTS_DEPTH, is_lenient=True)
    except RequestError:
        return text


def _require_function_type(entry: dict[str, Any], where: str) -> None:
    kind = entry.get("type")
    if kind == "function":
        return
    raise UnsupportedParameterError(f"{where}.type must be 'function', got {shown(kind)}", f"{where}.type")


def _read_name(value: Any, where: str) -> str:
    name: str = require_type(value, str, where)
    if not FUNCTION_NAME.fullmatch(name):
        raise RequestError(f"{where} must be 1 to 64 letters, digits, _ or -, got {name[:MAX_SHOWN_CHARS]!r}", where)
    return name
