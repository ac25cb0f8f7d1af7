"""The grammar of an answer that must have a form, must call a tool, or must do one of both.

If the model thinks, the thought comes first and the grammar begins after it. A JSON schema that is not strict is held
as far as a grammar can; the client is told the names of the keywords that are not held.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...engine.errors import CheckpointError, RequestError
from ...engine.text.grammar import GrammarCompiler, choice_rule, json_rule, regex_rule, require
from ...engine.text.schema_subset import supported_subset
from ..errors import UnsupportedParameterError
from ..parsers.forced import after_thought, forced_grammar
from ..parsers.formats import AnswerFormat
from ..wire.requests import ToolChoice
from .structured import ANY_OBJECT, Asked

MAX_SHOWN_PATHS = 5
MAX_PARAMETERS_CHARS = 1 << 20  # of all tools whose arguments are held to a schema together, as JSON
_RULES: dict[str, Callable[[Any], str]] = {"regex": regex_rule, "choice": choice_rule}


class Form(NamedTuple):
    """The grammar of an answer, and the request's field that it comes from.

    `left_out` names the keywords of schemas, and the parameters of tools, that the grammar does not hold.
    """

    field: str
    grammar: str
    left_out: tuple[str, ...] = ()
    holds_calls: bool = False


@dataclass(frozen=True)
class Calls:
    """The tools that an answer may call. `strict` names the tools whose arguments must follow the whole schema."""

    tools: list[dict[str, Any]]
    choice: ToolChoice
    strict: frozenset[str]

    @property
    def are_required(self) -> bool:
        return self.choice.mode == "required"


async def make_form(
    asked: Asked | None, calls: Calls | None, answer: AnswerFormat, compiler: GrammarCompiler
) -> Form | None:
    """The form of the answer, with a grammar that compiles; None: the answer is free.

    If calls are required the answer is calls. If calls are allowed beside a form the answer is calls or that form.
    Schemas are read and grammars compiled in the thread of `compiler`. Raises `RequestError`.
    """
    if asked is None and (calls is None or not calls.are_required):
        return None
    require("tools" if asked is None else asked.field)
    form = None
    if asked is not None:
        form = await _compiled(compiler, lambda: _asked_form(asked, calls, answer))
    return form if calls is None else await _compiled(compiler, lambda: _calling_form(asked, calls, answer))


async def _compiled(compiler: GrammarCompiler, write: Callable[[], Form]) -> Form:
    form = await asyncio.wrap_future(compiler.run(write))
    compiling = asyncio.wrap_future(compiler.compile(form.grammar).compiling)
    try:
        await asyncio.shield(compiling)  # requests with an equal grammar share the work: none may cancel it
    except (ValueError, CheckpointError) as error:
        raise RequestError(f"{form.field} cannot be used: {error}", form.field) from None
    return form


def _asked_form(asked: Asked, calls: Calls | None, answer: AnswerFormat) -> Form:
    if asked.kind != "grammar":
        rule, left_out = _rule(asked)
        return Form(asked.field, after_thought(rule, answer), left_out)
    if answer.thinks:
        message = f"{asked.field}: a model that thinks first takes no grammar; send json"
        raise UnsupportedParameterError(message, asked.field)
    if calls is not None:
        message = f"{asked.field}: beside tools no grammar is taken; send json, or tool_choice 'none'"
        raise UnsupportedParameterError(message, asked.field)
    return Form(asked.field, asked.value)


def _calling_form(asked: Asked | None, calls: Calls, answer: AnswerFormat) -> Form:
    tools, left_out = _held_tools(calls, answer)
    if asked is None or calls.are_required:
        return Form("tools", forced_grammar(tools, calls.choice, answer), left_out, holds_calls=True)
    rule, of_form = _rule(asked)
    grammar = forced_grammar(tools, calls.choice, answer, otherwise=rule)
    return Form("tools", grammar, of_form + left_out, holds_calls=True)


def _rule(asked: Asked) -> tuple[str, tuple[str, ...]]:
    """The right side of the form's rule, and the names of what it does not hold. Raises `RequestError`."""
    try:
        if asked.kind != "json":
            return _RULES[asked.kind](asked.value), ()
        schema, left_out = supported_subset(asked.value)
    except ValueError as error:
        raise RequestError(f"{asked.field} cannot be used: {error}", asked.field) from None
    if asked.is_strict:
        _refuse_unless_whole(asked.field, left_out)
    return json_rule(schema), tuple(f"{asked.field}.{path}" for path in left_out)


def _held_tools(calls: Calls, answer: AnswerFormat) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The tools with parameters that a grammar can hold, and the names of what is not held.

    A schema that cannot be used at all becomes any object. Raises `RequestError`.
    """
    tools, left_out, num_chars = [], [], 0
    for index, tool in enumerate(calls.tools):
        function, where = tool["function"], f"tools[{index}].function.parameters"
        if calls.choice.name not in (None, function["name"]):
            continue
        num_chars += len(json.dumps(function["parameters"]))
        if num_chars > MAX_PARAMETERS_CHARS:
            message = f"the parameters of all tools must have at most {MAX_PARAMETERS_CHARS} characters as JSON"
            raise RequestError(f"{where}: {message}; send fewer tools, or tool_choice 'auto' without a form", where)
        is_strict = function["name"] in calls.strict
        try:
            schema, paths = supported_subset(function["parameters"])
        except ValueError as error:
            if is_strict:
                raise RequestError(f"{where} cannot be used: {error}", where) from None
            schema, paths = ANY_OBJECT, ("",)
        assert answer.tools is not None
        paths += answer.tools.write_arguments("", schema).left_out
        if is_strict:
            _refuse_unless_whole(where, paths)
        left_out += [f"{where}.{path}".rstrip(".") for path in paths]
        tools.append(tool | {"function": function | {"parameters": schema}})
    return tools, tuple(left_out)


def _refuse_unless_whole(where: str, left_out: tuple[str, ...]) -> None:
    if not left_out:
        return
    first, *others = left_out[:MAX_SHOWN_PATHS]
    field = f"{where}.{first}"
    more = f" (nor to {', '.join(others)})" if others else ""
    raise UnsupportedParameterError(
        f"{field}: an answer cannot be held to this keyword{more}, as strict asks; leave it out of the schema, or send "
        "strict: false, with which the rest is kept",
        field,
    )
