"""Which formats this checkpoint answers in: as set, or as its chat template tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ...configs.schema import ServerConfig
from . import kimi_calls, reasoning
from .answer import AnswerParser
from .deltas import Parser, PlainText
from .json_calls import JsonCalls
from .kimi_calls import KimiCalls
from .reasoning import Thinking


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written. `in_template`: a template that spells this teaches the format, unless it spells one of
    `not_in_template`, which belong to formats with the same outer marker."""

    make: Callable[[], Parser]
    markers: tuple[str, ...]
    in_template: str
    not_in_template: tuple[str, ...] = ()


def _json_format(open_marker: str, close_marker: str, *others: str) -> ToolFormat:
    markers = (open_marker, close_marker)
    return ToolFormat(lambda: JsonCalls(*markers), markers, open_marker, others)


# Name in `tool_call_parser` -> format. Names are vLLM's.
TOOL_FORMATS = {
    "minimax": _json_format("<tool_calls>", "</tool_calls>"),
    "hermes": _json_format("<tool_call>", "</tool_call>", "<arg_key>", "<function="),
    "kimi_k2": ToolFormat(KimiCalls, kimi_calls.MARKERS, kimi_calls.CALL_BEGIN),
}
# MiniMax-M1 thinks, and its template, which Text-01 shares, does not say so.
THINKING_TEMPLATES = ("<think>", "</think>", "<beginning_of_sentence>ai")


class ControlTokens(Protocol):
    """What is needed of a tokenizer."""

    control_ids: frozenset[int]

    @property
    def chat_template(self) -> str: ...

    def token_text(self, token_id: int) -> str: ...


@dataclass(frozen=True)
class AnswerFormat:
    """How the answers to one request are read."""

    tools: ToolFormat | None = None
    thinks: bool = False
    is_thinking: bool = False  # where the prompt ends
    max_calls: int | None = None
    shown_ids: frozenset[int] = frozenset()  # control tokens that have to be seen as text
    hidden: tuple[str, ...] = ()  # what these spell, where content shall not show it

    def parser(self) -> AnswerParser:
        parser: Parser = PlainText() if self.tools is None else self.tools.make()
        if self.thinks:
            parser = Thinking(parser, has_begun=self.is_thinking)
        return AnswerParser(parser, hidden=self.hidden, max_calls=self.max_calls)


@dataclass(frozen=True)
class ChatFormat:
    """What a checkpoint's answers may hold."""

    tools: ToolFormat | None
    thinks: bool
    control_ids: dict[str, int]  # marker -> its token, where it has one that is hidden by default

    @classmethod
    def choose(cls, settings: ServerConfig, tokenizer: ControlTokens) -> ChatFormat:
        template = tokenizer.chat_template
        name = settings.tool_call_parser
        tools = _tools_in(template) if name == "auto" else TOOL_FORMATS.get(name)
        thinks = settings.reasoning_parser == "think"
        if settings.reasoning_parser == "auto":
            thinks = any(text in template for text in THINKING_TEMPLATES)
        markers = (reasoning.OPEN, reasoning.CLOSE) * thinks + (tools.markers if tools else ())
        spelled = {tokenizer.token_text(token_id): token_id for token_id in tokenizer.control_ids}
        return cls(tools, thinks, {marker: spelled[marker] for marker in markers if marker in spelled})

    def of_answer(self, *, with_tools: bool, is_thinking: bool, max_calls: int | None, hides: bool) -> AnswerFormat:
        """`hides`: the request wants no control tokens in its text."""
        tools = self.tools if with_tools else None
        markers = (reasoning.OPEN, reasoning.CLOSE) * self.thinks + (tools.markers if tools else ())
        shown = [marker for marker in markers if marker in self.control_ids]
        return AnswerFormat(
            tools=tools,
            thinks=self.thinks,
            is_thinking=is_thinking,
            max_calls=max_calls,
            shown_ids=frozenset(self.control_ids[marker] for marker in shown),
            hidden=tuple(shown) if hides else (),
        )


def _tools_in(template: str) -> ToolFormat | None:
    for known in TOOL_FORMATS.values():
        if known.in_template in template and not any(other in template for other in known.not_in_template):
            return known
    return None
