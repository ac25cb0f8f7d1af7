"""What an answer has to be: `response_format` and `structured_outputs`, and tools that have to be called, as a grammar.

A thought comes first, where the model thinks: the grammar begins after it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ..engine.errors import CheckpointError, RequestError
from ..engine.grammar import GrammarCompiler, choice_rule, json_rule, regex_rule, require
from .errors import UnsupportedParameterError
from .json_body import drop_nulls, parse_object, require_type
from .parsers.forced import after_thought
from .parsers.formats import AnswerFormat
from .protocol import GenerationRequest

MAX_SCHEMA_CHARS = 65_536
MAX_REGEX_CHARS = 8_192
MAX_CHOICES = 1_024
MAX_CHOICE_CHARS = 8_192
MAX_SCHEMA_DEPTH = 32
MAX_SHOWN_CHARS = 80
ANY_OBJECT = {"type": "object"}
SCHEMA_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_RULES: dict[str, Callable[[Any], str]] = {"json": json_rule, "regex": regex_rule, "choice": choice_rule}
KINDS = ("json", "json_object", "regex", "choice", "grammar")


class Form(NamedTuple):
    """What an answer has to be, and the field of the request that says so."""

    field: str
    grammar: str


async def read_form(request: GenerationRequest, answer: AnswerFormat, compiler: GrammarCompiler) -> Form | None:
    """The grammar that the request asks for, which compiles. Raises `RequestError`, naming the field."""
    asked = _read_format(request.response_format), _read_structured(request.structured_outputs)
    if asked[0] and asked[1]:
        raise RequestError("response_format and structured_outputs exclude each other", "structured_outputs")
    field, kind, value = asked[0] or asked[1] or ("", "", None)
    if not field:
        return None
    if answer.tools is not None:
        raise UnsupportedParameterError(
            f"{field} is not supported beside tools that may be called; send tool_choice 'none'", field
        )
    require(field)
    return await checked(_lark(field, kind, value, answer), field, compiler)


async def checked(grammar: str, field: str, compiler: GrammarCompiler) -> Form:
    """The form, once its grammar has been compiled, aside. Raises `RequestError`."""
    try:
        await asyncio.wrap_future(compiler.compile(grammar).compiling)
    except (ValueError, CheckpointError) as error:
        raise RequestError(f"{field} cannot be used: {error}", field) from None
    return Form(field, grammar)


def _lark(field: str, kind: str, value: Any, answer: AnswerFormat) -> str:
    if kind == "grammar":
        if answer.thinks:
            raise UnsupportedParameterError(f"{field}: a model that thinks first takes no grammar; send json", field)
        return str(value)
    try:
        rule = _RULES[kind](value)
    except ValueError as error:
        raise RequestError(f"{field} cannot be used: {error}", field) from None
    return after_thought(rule, answer)


def _read_format(value: Any) -> tuple[str, str, Any] | None:
    """OpenAI's response_format -> (field, kind, value), or None for plain text."""
    if value is None:
        return None
    entry = drop_nulls(require_type(value, dict, "response_format"))
    match entry.get("type"):
        case "text":
            return None
        case "json_object":
            return "response_format", "json", ANY_OBJECT
        case "json_schema":
            return _read_json_schema(entry)
    where, shown = "response_format.type", json.dumps(entry.get("type"))[:MAX_SHOWN_CHARS]
    raise RequestError(f"{where} must be text, json_object or json_schema, got {shown}", where)


def _read_json_schema(entry: dict[str, Any]) -> tuple[str, str, Any]:
    where = "response_format.json_schema"
    described = drop_nulls(require_type(entry.get("json_schema"), dict, where))
    name = require_type(described.get("name"), str, f"{where}.name")
    if not SCHEMA_NAME.fullmatch(name):
        raise RequestError(f"{where}.name must match {SCHEMA_NAME.pattern}, got {name[:80]!r}", f"{where}.name")
    if "strict" in described:
        require_type(described["strict"], bool, f"{where}.strict")
    schema = require_type(described.get("schema", ANY_OBJECT), dict, f"{where}.schema")
    return f"{where}.schema", "json", _bounded(schema, f"{where}.schema")


def _read_structured(value: Any) -> tuple[str, str, Any] | None:
    """vLLM's structured_outputs -> (field, kind, value)."""
    if value is None:
        return None
    entry = drop_nulls(require_type(value, dict, "structured_outputs"))
    for name in entry:
        if name not in KINDS:
            raise UnsupportedParameterError(
                f"structured_outputs.{name[:80]} is not supported; send one of {', '.join(KINDS)}", "structured_outputs"
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
        return where, "json", ANY_OBJECT
    if kind == "json":
        return where, kind, _bounded(_read_schema(wanted, where), where)
    if kind == "choice":
        return where, kind, _read_choices(wanted, where)
    bound = MAX_REGEX_CHARS if kind == "regex" else MAX_SCHEMA_CHARS
    return where, kind, _read_text(wanted, where, bound)


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
