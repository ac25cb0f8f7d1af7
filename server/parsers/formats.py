"""The formats of this checkpoint's answers, by setting or by chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ...configs.schema import ServerConfig
from ...engine.errors import ConfigError
from ...engine.text.detokenizer import StopScope
from . import kimi_calls as kimi
from . import reasoning, xml_calls
from .answer import AnswerParser
from .arguments import Arguments, json_arguments
from .deltas import Parser, PlainText
from .json_calls import JsonCalls
from .kimi_calls import KimiCalls
from .reasoning import AfterThought, Thinking
from .xml_arguments import xml_arguments
from .xml_calls import XmlCalls

NUMBER = "{number}"  # in a layout: the number of a call, any digits
Schemas = Mapping[str, dict[str, Any]]  # name of a function -> the JSON schema of its arguments
# Of the thought at the end of a prompt. "open": the answer continues it. "over": the answer has none. "none": the model
# decides.
ThoughtState = Literal["none", "open", "over"]


@dataclass(frozen=True)
class CallLayout:
    """The text around a function's name and its arguments, as models are trained to write it."""

    begin: str
    before_name: str
    before_arguments: str
    after_arguments: str
    separator: str
    end: str


@dataclass(frozen=True)
class ToolFormat:
    """A format of calls.

    A chat template with the text `in_template` teaches it, unless the template has one of `not_in_template`, which
    belong to other formats with the same outer marker. `ends_thought`: the texts with which a call begins that ends a
    thought; none: a call in a thought belongs to the thought. `write_arguments`: name of a rule, schema -> the rule.
    """

    make: Callable[[Schemas], Parser]
    markers: tuple[str, ...]
    layout: CallLayout
    in_template: str
    not_in_template: tuple[str, ...] = ()
    ends_thought: tuple[str, ...] = ()
    write_arguments: Callable[[str, dict[str, Any]], Arguments] = json_arguments


# Name in `tool_call_parser` -> format. Names are vLLM's.
TOOL_FORMATS = {
    "minimax": ToolFormat(
        lambda _: JsonCalls("<tool_calls>", "</tool_calls>"),
        ("<tool_calls>", "</tool_calls>"),
        CallLayout("<tool_calls>\n", '{"name": "', '", "arguments": ', "}", "\n", "\n</tool_calls>"),
        in_template="<tool_calls>",
    ),
    "hermes": ToolFormat(
        lambda _: JsonCalls("<tool_call>", "</tool_call>"),
        ("<tool_call>", "</tool_call>"),
        CallLayout("", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", ""),
        in_template="<tool_call>",
        not_in_template=("<arg_key>", "<function="),  # GLM, Qwen3-Coder
        ends_thought=("<tool_call>", "{", '"name"'),
    ),
    "kimi_k2": ToolFormat(
        lambda _: KimiCalls(),
        kimi.MARKERS,
        CallLayout(
            kimi.SECTION_BEGIN,
            f"{kimi.CALL_BEGIN}functions.",
            f":{NUMBER}{kimi.ARGUMENTS_BEGIN}",
            kimi.CALL_END,
            "",
            kimi.SECTION_END,
        ),
        in_template=kimi.CALL_BEGIN,
    ),
    "qwen3_coder": ToolFormat(
        XmlCalls,
        xml_calls.MARKERS,
        CallLayout("", "<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", "\n", ""),
        in_template=xml_calls.PARAMETER,
        ends_thought=xml_calls.OPENING,
        write_arguments=xml_arguments,
    ),
}
# The last is of MiniMax-M1, which thinks. Its template, which Text-01 shares, does not tell.
THINKING_TEMPLATES = ("<think>", "</think>", "<beginning_of_sentence>ai")


class ControlTokens(Protocol):
    """The part of a tokenizer that is needed here."""

    control_ids: frozenset[int]
    added_ids: dict[str, int]

    @property
    def chat_template(self) -> str: ...

    @property
    def takes_tools(self) -> bool: ...

    def token_text(self, token_id: int) -> str: ...


@dataclass(frozen=True)
class AnswerFormat:
    """How the answers to one request are read.

    `schemas`: those of the functions that may be called. `control_ids`: the markers that are control tokens, with
    their ids. `token_ids`: the markers that are one token each; a model writes them so, and a grammar has to ask for
    the token, which it does not take for its text. `stray`: markers that are no content either,
    should the model write one without need.
    """

    tools: ToolFormat | None = None
    schemas: Schemas = field(default_factory=dict)
    thinks: bool = False
    is_thinking: bool = False  # the prompt ends in an open thought
    max_calls: int | None = None
    control_ids: Mapping[str, int] = field(default_factory=dict)
    token_ids: Mapping[str, int] = field(default_factory=dict)
    stray: tuple[str, ...] = ()
    hides: bool = True  # control tokens and stray markers are kept out of the content
    stops_in_thought: bool = False

    @property
    def shown_ids(self) -> frozenset[int]:
        """Control tokens that must reach the parser as text."""
        return frozenset(self.control_ids.values())

    def stop_scope(self) -> StopScope | None:
        """Where stop strings count in one answer: outside the thought, unless asked for. None: everywhere."""
        if not self.thinks or self.stops_in_thought:
            return None
        return AfterThought(has_begun=self.is_thinking, call=self._ends_thought)

    def parser(self) -> AnswerParser:
        parser: Parser = PlainText() if self.tools is None else self.tools.make(self.schemas)
        if self.thinks:
            parser = Thinking(parser, has_begun=self.is_thinking, call=self._ends_thought)
        hidden = tuple({*self.control_ids, *self.stray}) if self.hides else ()
        return AnswerParser(parser, hidden=hidden, max_calls=self.max_calls)

    @property
    def _ends_thought(self) -> tuple[str, ...]:
        return () if self.tools is None else self.tools.ends_thought


@dataclass(frozen=True)
class ChatFormat:
    """The formats that a checkpoint's answers may have."""

    tools: ToolFormat | None
    thinks: bool
    controls: Mapping[str, int]  # text of a control token -> its id
    added: Mapping[str, int]  # the same of all tokens beside the vocabulary

    @classmethod
    def choose(cls, settings: ServerConfig, tokenizer: ControlTokens) -> ChatFormat:
        """By settings and template. Raises `ConfigError` if a parser of calls is set and the template has no tools."""
        template = tokenizer.chat_template
        name = settings.tool_call_parser
        if name not in ("auto", "none") and not tokenizer.takes_tools:
            raise ConfigError(
                f"tool_call_parser is {name!r}, but the model's chat template does not use tools: leave the setting "
                "out, or give a template that does (chat_template)"
            )
        tools = _tools_in(template) if name == "auto" else TOOL_FORMATS.get(name)
        thinks = settings.reasoning_parser == "think"
        if settings.reasoning_parser == "auto":
            thinks = any(text in template for text in THINKING_TEMPLATES)
        controls = {tokenizer.token_text(token_id): token_id for token_id in tokenizer.control_ids}
        return cls(tools, thinks, controls, tokenizer.added_ids)

    def of_answer(
        self,
        *,
        tools: Sequence[dict[str, Any]],
        thought: ThoughtState,
        max_calls: int | None,
        hides: bool,
        stops_in_thought: bool = False,
    ) -> AnswerFormat:
        """`tools`: those that the model is shown, as `read_tools` returns them. `thought`: its state where the prompt
        ends. `hides`: the request wants no control tokens in the content."""
        format_ = self.tools if tools else None
        thinks = self.thinks and thought != "over"
        markers = (reasoning.OPEN, reasoning.CLOSE) * thinks + (format_.markers if format_ else ())
        return AnswerFormat(
            tools=format_,
            schemas={tool["function"]["name"]: tool["function"]["parameters"] for tool in tools},
            thinks=thinks,
            is_thinking=thought == "open",
            max_calls=max_calls,
            control_ids={marker: self.controls[marker] for marker in markers if marker in self.controls},
            token_ids={marker: self.added[marker] for marker in markers if marker in self.added},
            stray=(reasoning.CLOSE,) * self.thinks,
            hides=hides,
            stops_in_thought=stops_in_thought,
        )


def _tools_in(template: str) -> ToolFormat | None:
    for known in TOOL_FORMATS.values():
        if known.in_template in template and not any(other in template for other in known.not_in_template):
            return known
    return None
