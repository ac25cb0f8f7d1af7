"""Tools of a response -> tools of chat. A custom tool becomes a function of one text; built-in tools are left out."""

from __future__ import annotations

from typing import Any

from ...engine.errors import RequestError
from ..door.body import MAX_SHOWN_CHARS, drop_nulls, require_type, shown
from ..door.fields import refuse_unless_neutral
from ..errors import UnsupportedParameterError
from ..parsers.custom_input import INPUT
from .input import FieldNames

SERVED_TYPES = ("function", "custom")
TOOL_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
    "output_schema": (),
}


def read_tools(tools: Any, names: FieldNames) -> tuple[Any, list[str]]:
    """(chat's tools, the names of tools that are left out). Chat refuses a value that is no list of objects."""
    if not isinstance(tools, list):
        return tools, []
    served: list[Any] = []
    left_out: dict[str, None] = {}
    for index, entry in enumerate(tools):
        where = f"tools[{index}]"
        kind = entry.get("type") if isinstance(entry, dict) else None
        if isinstance(kind, str) and kind not in SERVED_TYPES:  # a built-in tool of OpenAI
            left_out[f"tools[].{kind}"] = None
            continue
        names.note(f"tools[{len(served)}]", where)
        names.note(f"tools[{len(served)}].function", where)
        served.append(_as_function(entry, where, left_out) if isinstance(entry, dict) else entry)
    return served, list(left_out)


def custom_names(tools: Any) -> frozenset[str]:
    """The names of custom tools, whose calls clients get as text."""
    return frozenset(tool["name"] for tool in tools or [] if tool.get("type") == "custom")


def repeated_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools that are served, as a response repeats them."""
    defaults = {"function": {"parameters": None, "strict": False}, "custom": {}}
    return [defaults[tool["type"]] | drop_nulls(tool) for tool in tools or [] if tool["type"] in SERVED_TYPES]


def read_tool_choice(value: Any) -> Any:
    """The value as chat's `tool_choice`. Raises `RequestError`."""
    if isinstance(value, dict):
        if value.get("type") not in SERVED_TYPES:
            found = repr(value.get("type"))[:MAX_SHOWN_CHARS]
            raise UnsupportedParameterError(
                f"tool_choice.type must be 'function' or 'custom', got {found}", "tool_choice.type"
            )
        return {"type": "function", "function": {name: entry for name, entry in value.items() if name != "type"}}
    if value not in (None, "none", "auto", "required"):
        allowed = 'none, auto, required or {"type": "function", "name": ...}'
        raise RequestError(f"tool_choice must be {allowed}, got {shown(value)}", "tool_choice")
    return value


def _as_function(tool: dict[str, Any], where: str, left_out: dict[str, None]) -> dict[str, Any]:
    function = drop_nulls({name: value for name, value in tool.items() if name != "type"})
    for name in TOOL_NEUTRAL_VALUES.keys() & function.keys():
        refuse_unless_neutral(f"{where}.{name}", function.pop(name), TOOL_NEUTRAL_VALUES[name])
    if tool.get("type") == "custom":
        function["parameters"] = _text_parameter(function.pop("format", {}), f"{where}.format", left_out)
        return {"type": "function", "function": function}
    return {"type": tool.get("type"), "function": function}


def _text_parameter(form: Any, where: str, left_out: dict[str, None]) -> dict[str, Any]:
    """The parameters of a custom tool. The model is told of a grammar, but its answer is not held to it."""
    form = require_type(form, dict, where)
    text = {"type": "string"}
    if form.get("type", "text") != "text":
        left_out["tools[].format"] = None
        syntax, definition = (require_type(form.get(name, ""), str, where) for name in ("syntax", "definition"))
        text["description"] = f"Text that follows this {syntax} grammar:\n{definition}"
    return {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}
