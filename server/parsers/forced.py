"""The grammar of an answer that is held to calls, to a form, or to one of both, in llguidance's Lark.

A thought may come first. The arguments of a call follow the schema of their function. Each schema stands alone, so that
its `$ref`s keep their root.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ...engine.text.grammar import json_rule
from ..wire.requests import ToolChoice
from . import reasoning
from .formats import NUMBER, AnswerFormat

ANYTHING = r"/(.|\n)*/"
SPACES = r"/\s{0,4}/"
DIGITS = r"/[0-9]{1,4}/"
OBJECT = {"type": "object"}


def forced_grammar(
    tools: list[dict[str, Any]], choice: ToolChoice, answer: AnswerFormat, otherwise: str | None = None
) -> str:
    """One call at least, of any of `tools` or of the one that `choice` names; just one where `answer` takes no more.

    `tools` are those of `tools.read_tools`, with parameters that a grammar can hold; `answer` is a format that has
    calls. Arguments are an object, also where their schema leaves that open. `otherwise` is the right side of a rule
    for an answer that calls nothing; None: there has to be a call.
    """
    assert answer.tools is not None
    layout, lark = answer.tools.layout, _Lark(answer)
    functions = [tool["function"] for tool in tools if choice.name in (None, tool["function"]["name"])]
    more = "" if answer.max_calls == 1 else f"({lark.text(layout.separator)} call)*"
    rules = [
        f"start: {lark.thought()} " + ("calls" if otherwise is None else "(calls | answer)"),
        f"calls: {lark.text(layout.begin)} call {more} {lark.text(layout.end)}",
        "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
    ]
    if otherwise is not None:
        rules.append(f"answer: {otherwise}")
    for i, function in enumerate(functions):
        head = lark.text(layout.before_name + function["name"] + layout.before_arguments)
        rules.append(f"call_{i}: {head} arguments_{i} {lark.text(layout.after_arguments)}")
        rules.append(f"arguments_{i}: {json_rule(function['parameters'] | OBJECT)}")
    return "\n".join([*rules, *lark.thought_rules()]) + "\n"


def after_thought(rule: str, answer: AnswerFormat) -> str:
    """What the right side of a rule says, after a thought where `answer` may have one."""
    lark = _Lark(answer)
    return "\n".join([f"start: {lark.thought()} answer", f"answer: {rule}", *lark.thought_rules()]) + "\n"


class _Lark:
    """Text with markers as Lark: a marker that is a control token by its name, all else by its letters."""

    def __init__(self, answer: AnswerFormat) -> None:
        self._answer = answer
        special = "|".join(map(re.escape, (NUMBER, *answer.control_ids)))
        self._special = re.compile(f"({special})")

    def text(self, text: str) -> str:
        return " ".join(map(self._piece, filter(None, self._special.split(text))))

    def thought(self) -> str:
        if not self._answer.thinks:
            return ""
        return "thought" if self._answer.is_thinking else f"({self.text(reasoning.OPEN)} thought)?"

    def thought_rules(self) -> list[str]:
        if not self._answer.thinks:
            return []
        if reasoning.CLOSE in self._answer.control_ids:
            return [f"thought: {ANYTHING} {reasoning.CLOSE} {SPACES}"]
        closing = json.dumps(reasoning.CLOSE)
        return [f"thought: until_closed {SPACES}", f"until_closed[suffix={closing}]: {ANYTHING}"]

    def _piece(self, piece: str) -> str:
        if piece == NUMBER:
            return DIGITS
        return piece if piece in self._answer.control_ids else json.dumps(piece)
