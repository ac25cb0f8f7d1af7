"""Calls as models write them, spelt here by hand, so that no table of the server is its own oracle."""

from __future__ import annotations

import json

MARKERS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "kimi_k2": (
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_section_begin|>",
        "<|tool_call_section_end|>",
    ),
    "minimax": ("<tool_calls>", "</tool_calls>"),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
}
FORMATS = sorted(MARKERS)
JSON_FORMATS = [name for name in FORMATS if name != "qwen3_coder"]  # arguments are given on as they are written


def write(name: str, *calls: tuple[str, str]) -> str:
    """Calls (function, arguments as JSON) in the way of a format."""
    if name == "kimi_k2":
        inner = "".join(
            f"<|tool_call_begin|>functions.{function}:{i}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
            for i, (function, arguments) in enumerate(calls)
        )
        return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"
    if name == "qwen3_coder":
        return "\n".join(
            f"<tool_call>\n<function={function}>\n{_parameters(arguments)}</function>\n</tool_call>"
            for function, arguments in calls
        )
    objects = [f'{{"name": "{function}", "arguments": {arguments}}}' for function, arguments in calls]
    if name == "minimax":
        return "\n".join(["<tool_calls>", *objects, "</tool_calls>"])
    return "\n".join(f"<tool_call>\n{entry}\n</tool_call>" for entry in objects)


def _parameters(arguments: str) -> str:
    """A text that is no object, or no JSON, is a parameter's value."""
    try:
        values = json.loads(arguments)
    except ValueError:
        values = arguments
    entries = values.items() if isinstance(values, dict) else [("x", values)]
    texts = [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for key, value in entries
    ]
    return "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts)
