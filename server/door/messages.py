"""Chat messages: any JSON -> the plain dicts that a chat template reads."""

from __future__ import annotations

from typing import Any

from ...engine.errors import RequestError
from ..errors import UnsupportedParameterError
from ..wire.schemas import ROLES
from .body import drop_nulls, json_type, require_type, shown
from .fields import refuse_unless_neutral
from .tools import read_calls

MAX_MESSAGES = 4096
MAX_PARTS = 4096
PART_SEPARATOR = "\n"  # as vLLM joins text parts

TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content")
SYNONYMS = {"reasoning": "reasoning_content"}  # vLLM's newer name; templates read the older one
# Types of parts with OpenAI, vLLM and Qwen that are no text.
MEDIA = frozenset(
    {"image_url", "input_image", "image", "video_url", "input_video", "video"}
    | {"input_audio", "audio_url", "audio", "file", "input_file"}
)
# Fields of an earlier answer that a client sends back -> their values that ask for nothing.
MESSAGE_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "audio": (),
    "annotations": ([],),
}


def read_messages(value: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages with string contents and parsed calls, and the names of the undocumented fields.

    Raises `RequestError`.
    """
    if not isinstance(value, list):
        raise RequestError(f"messages must be a list of objects, got {json_type(value)}", "messages")
    if not 0 < len(value) <= MAX_MESSAGES:
        raise RequestError(f"messages must have 1 to {MAX_MESSAGES} entries, got {len(value)}", "messages")
    messages: list[dict[str, Any]] = []
    unknown: dict[str, None] = {}
    for index, entry in enumerate(value):
        where = f"messages[{index}]"
        message, names = _read_message(drop_nulls(require_type(entry, dict, where)), where)
        messages.append(message)
        unknown.update(dict.fromkeys(f"messages[].{name}" for name in names))
    return messages, list(unknown)


def _read_message(entry: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    role, calls = _read_role(entry, where), _read_calls(entry, where)
    content = _read_answer(entry, where) if role == "assistant" else _read_content(entry, where)
    message: dict[str, Any] = {"role": role, "content": content}
    if calls:  # some templates test for the key alone
        message["tool_calls"] = calls
    unknown = []
    for name, value in entry.items():
        name = SYNONYMS.get(name, name)
        if name in MESSAGE_NEUTRAL_VALUES:
            refuse_unless_neutral(f"{where}.{name}", value, MESSAGE_NEUTRAL_VALUES[name])
        elif name in TEXT_FIELDS:
            message[name] = require_type(value, str, f"{where}.{name}")
        elif name not in ("role", "content", "tool_calls") and not (name == "refusal" and role == "assistant"):
            unknown.append(name)
    return message, unknown


def _read_calls(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    calls, where = entry.get("tool_calls", []), f"{where}.tool_calls"
    if calls and entry.get("role") != "assistant":
        raise RequestError(f"{where} may only be in a message of the assistant", where)
    return read_calls(calls, where)


def _read_role(entry: dict[str, Any], where: str) -> str:
    role = entry.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, got {shown(role)}", f"{where}.role")
    # "developer" is OpenAI's newer name of "system"; templates read the older one.
    return "system" if role == "developer" else str(role)


def _read_answer(entry: dict[str, Any], where: str) -> str:
    """The content of an assistant's message, joined with its refusal.

    The content may be missing beside calls, or null as some clients store it. A refusal is a field or a part.
    """
    said = _read_content({"content": "", **entry}, where)
    refusal = require_type(entry.get("refusal", ""), str, f"{where}.refusal")
    return PART_SEPARATOR.join(text for text in (said, refusal) if text)


def _read_content(entry: dict[str, Any], where: str) -> str:
    content, where = entry.get("content"), f"{where}.content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts, got {json_type(content)}", where)
    if len(content) > MAX_PARTS:
        raise RequestError(f"{where} must have at most {MAX_PARTS} parts, got {len(content)}", where)
    kinds = ("text", "refusal") if entry.get("role") == "assistant" else ("text",)
    return PART_SEPARATOR.join(_read_part(part, kinds, f"{where}[{i}]") for i, part in enumerate(content))


def refuse_media(kind: Any, where: str) -> None:
    """Raises `UnsupportedParameterError` for the type of a part that holds anything but text."""
    if isinstance(kind, str) and kind in MEDIA:
        raise UnsupportedParameterError(
            f"{where}: the model is served for text alone and cannot read {kind}; send text, or leave the part out",
            where,
        )


def _read_part(part: Any, kinds: tuple[str, ...], where: str) -> str:
    """A part's text, which lies under the name of the part's type."""
    kind = require_type(part, dict, where).get("type")
    refuse_media(kind, f"{where}.type")
    if not isinstance(kind, str) or kind not in kinds:
        raise UnsupportedParameterError(
            f"{where}.type must be {' or '.join(map(repr, kinds))}, got {shown(kind)}", f"{where}.type"
        )
    return str(require_type(part.get(kind), str, f"{where}.{kind}"))
