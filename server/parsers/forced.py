"""The grammar, in llguidance's Lark, of an answer that must call tools, must have a form, or must do one of both.

A thought may come first. The arguments of a call follow the schema of their function. Each schema is a rule of its own,
so that its `$ref`s keep their root; rules that formats repeat for every function come once.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..wire.requests import ToolChoice
from . import reasoning
from .formats import NUMBER, AnswerFormat

ANYTHING = r"/(.|\n)*/"
SPACES = r"/\s{0,4}/"
DIGITS = r"/[0-9]{1,4}/"


def forced_grammar(
    tools: list[dict[str, Any]], choice: ToolChoice, answer: AnswerFormat, otherwise: str | None = None
) -> str:
    """The grammar of one or more calls of `tools`, or of the tool that `choice` names.

    `tools`: the result of `read_tools`, with parameters that a grammar can hold. `answer`: a format that has calls; its
    `max_calls` of 1 allows one call only. Arguments are an object, also if their schema leaves that open. `otherwise`:
    the right side of a rule for an answer without calls; None: the answer must have a call.
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
        rules += answer.tools.write_arguments(f"arguments_{i}", function["parameters"]).rules
    return "\n".join([*dict.fromkeys(rules), *lark.thought_rules()]) + "\n"


def after_thought(rule: str, answer: AnswerFormat) -> str:
    """The grammar of an answer by `rule`, the right side of a rule, after a thought if `answer` may have one."""
    lark = _Lark(answer)
    return "\n".join([f"start: {lark.thought()} answer", f"answer: {rule}", *lark.thought_rules()]) + "\n"


class _Lark:
    """Writes text as Lark: markers that are tokens by their ids, all other text by its characters."""

    def __init__(self, answer: AnswerFormat) -> None:
        self._answer = answer
        special = "|".join(map(re.escape, (NUMBER, *answer.token_ids)))
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
        if reasoning.CLOSE in self._answer.token_ids:
            return [f"thought: {ANYTHING} {self.text(reasoning.CLOSE)} {SPACES}"]
        closing = json.dumps(reasoning.CLOSE)
        return [f"thought: until_closed {SPACES}", f"until_closed[suffix={closing}]: {ANYTHING}"]

    def _piece(self, piece: str) -> str:
        if piece == NUMBER:
            return DIGITS
        token_id = self._answer.token_ids.get(piece)
        return json.dumps(piece) if token_id is None else f"<[{token_id}]>"
