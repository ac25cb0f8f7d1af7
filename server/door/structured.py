"""The form that a request asks of its answer, by `response_format` or vLLM's `structured_outputs`."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from ...engine.errors import RequestError
from ..errors import UnsupportedParameterError
from ..wire.requests import GenerationRequest
from .body import MAX_SHOWN_CHARS, drop_nulls, parse_object, require_type

MAX_SCHEMA_CHARS = 65_536
MAX_REGEX_CHARS = 8_192
MAX_CHOICES = 1_024
MAX_CHOICE_CHARS = 8_192
MAX_SCHEMA_DEPTH = 128
ANY_OBJECT = {"type": "object"}
SCHEMA_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
KINDS = ("json", "json_object", "regex", "choice", "grammar")


class Asked(NamedTuple):
    """A form of an answer: `kind` is json, regex, choice or grammar, and `value` its schema, pattern, texts or grammar.

    `field`: where the request says it. `is_strict`: the answer must follow the whole schema.
    """

    field: str
    kind: str
    value: Any
    is_strict: bool = False


def read_asked(request: GenerationRequest) -> tuple[Asked | None, list[str]]:
    """The form that is asked for, None for plain text; and the names of the fields that change nothing.

    Raises `RequestError`, naming the field.
    """
    by_format, ignored = _read_format(request.response_format)
    by_structured = _read_structured(request.structured_outputs)
    if by_format and by_structured:
        raise RequestError("response_format and structured_outputs exclude each other", "structured_outputs")
    return by_format or by_structured, ignored


def _read_format(value: Any) -> tuple[Asked | None, list[str]]:
    """OpenAI's response_format, where `json_object` may have a `schema`, as with llama.cpp and Together."""
    if value is None:
        return None, []
    entry = drop_nulls(require_type(value, dict, "response_format"))
    known, asked = {"type"}, None
    ignored: list[str] = []
    match entry.get("type"):
        case "text":
            pass
        case "json_object":
            known.add("schema")
            asked = _read_json_object(entry)
        case "json_schema":
            known.add("json_schema")
            asked, ignored = _read_json_schema(entry)
        case other:
            where, shown = "response_format.type", json.dumps(other)[:MAX_SHOWN_CHARS]
            raise RequestError(f"{where} must be text, json_object or json_schema, got {shown}", where)
    return asked, [*(f"response_format.{name}" for name in entry if name not in known), *ignored]


def _read_json_object(entry: dict[str, Any]) -> Asked:
    if "schema" not in entry:
        return Asked("response_format", "json", ANY_OBJECT)
    where = "response_format.schema"
    return Asked(where, "json", _bounded(require_type(entry["schema"], dict, where), where))


def _read_json_schema(entry: dict[str, Any]) -> tuple[Asked, list[str]]:
    where = "response_format.json_schema"
    described = drop_nulls(require_type(entry.get("json_schema"), dict, where))
    name = require_type(described.get("name"), str, f"{where}.name")
    if not SCHEMA_NAME.fullmatch(name):
        raise RequestError(
            f"{where}.name must match {SCHEMA_NAME.pattern}, got {name[:MAX_SHOWN_CHARS]!r}", f"{where}.name"
        )
    is_strict = require_type(described.get("strict", False), bool, f"{where}.strict")
    schema = require_type(described.get("schema", ANY_OBJECT), dict, f"{where}.schema")
    asked = Asked(f"{where}.schema", "json", _bounded(schema, f"{where}.schema"), is_strict)
    return asked, [f"{where}.{name}" for name in described if name not in ("name", "schema", "strict")]


def _read_structured(value: Any) -> Asked | None:
    """vLLM's structured_outputs, whose schemas are never strict."""
    if value is None:
        return None
    entry = drop_nulls(require_type(value, dict, "structured_outputs"))
    for name in entry:
        if name not in KINDS:
            raise UnsupportedParameterError(
                f"structured_outputs.{name[:MAX_SHOWN_CHARS]} is not supported; send one of {', '.join(KINDS)}",
                "structured_outputs",
            )
    if len(entry) != 1:
        raise RequestError(
            f"structured_outputs must have exactly one of {', '.join(KINDS)}, got {len(entry)}", "structured_outputs"
        )
    ((kind, wanted),) = entry.items()
    where = f"structured_outputs.{kind}"
    if kind == "json_object":
        if require_type(wanted, bool, where) is False:
            raise RequestError(f"{where} must be true, got false", where)
        return Asked(where, "json", ANY_OBJECT)
    if kind == "json":
        return Asked(where, kind, _bounded(_read_schema(wanted, where), where))
    if kind == "choice":
        return Asked(where, kind, _read_choices(wanted, where))
    bound = MAX_REGEX_CHARS if kind == "regex" else MAX_SCHEMA_CHARS
    return Asked(where, kind, _read_text(wanted, where, bound))


def _read_schema(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, str):
        return dict(require_type(value, dict, where))
    try:
        return parse_object(_read_text(value, where, MAX_SCHEMA_CHARS).encode(), MAX_SCHEMA_DEPTH)
    except RequestError as error:
        reason = str(error).replace("the body", "it", 1)
        raise RequestError(f"{where} must be a JSON schema: {reason}", where) from None


def _bounded(schema: dict[str, Any], where: str) -> dict[str, Any]:
    length = len(json.dumps(schema))
    if length > MAX_SCHEMA_CHARS:
        raise RequestError(f"{where} must have at most {MAX_SCHEMA_CHARS} characters as JSON, got {length}", where)
    return schema


def _read_choices(value: Any, where: str) -> list[str]:
    choices = require_type(value, list, where)
    if not 0 < len(choices) <= MAX_CHOICES:
        raise RequestError(f"{where} must have 1 to {MAX_CHOICES} entries, got {len(choices)}", where)
    return [_read_text(choice, f"{where}[{i}]", MAX_CHOICE_CHARS) for i, choice in enumerate(choices)]


def _read_text(value: Any, where: str, bound: int) -> str:
    text = require_type(value, str, where)
    if not 0 < len(text) <= bound:
        raise RequestError(f"{where} must have 1 to {bound} characters, got {len(text)}", where)
    return str(text)
