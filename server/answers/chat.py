"""Deltas of parsers -> the messages of OpenAI's chat objects, whole and in chunks."""

from __future__ import annotations

import uuid

from msgspec import UNSET

from ...engine.outputs import RequestOutput
from ..parsers.answer import AnswerParser
from ..parsers.deltas import CallArguments, CallBegin, Content, Delta, Reasoning
from ..wire.answers import (
    ChatDelta,
    ChatFinishReason,
    ChatMessage,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)


def read_deltas(parser: AnswerParser, output: RequestOutput) -> list[Delta]:
    """What one output, or all of them as one, adds to an answer."""
    deltas = parser.push(output.text)
    return deltas if output.finish_reason is None else [*deltas, *parser.finish()]


def finish_reason(parser: AnswerParser, output: RequestOutput) -> ChatFinishReason:
    """Of an answer that has ended."""
    if output.finish_reason != "stop":
        return "length"
    return "tool_calls" if parser.num_calls else "stop"


def chunk_delta(delta: Delta) -> ChatDelta:
    """A call comes as its name first, then as pieces of its arguments."""
    match delta:
        case Content():
            return ChatDelta(content=delta.text)
        case Reasoning():
            return ChatDelta(reasoning_content=delta.text)
        case CallBegin():
            begun = ToolCallDelta(delta.index, FunctionDelta("", delta.name), _id_of(delta), "function")
            return ChatDelta(tool_calls=[begun])
        case CallArguments():
            return ChatDelta(tool_calls=[ToolCallDelta(delta.index, FunctionDelta(delta.text))])


def whole_message(deltas: list[Delta]) -> ChatMessage:
    content = "".join(delta.text for delta in deltas if isinstance(delta, Content))
    thought = "".join(delta.text for delta in deltas if isinstance(delta, Reasoning))
    calls: list[ToolCall] = []
    pieces: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, CallBegin):
            calls.append(ToolCall(_id_of(delta), FunctionCall(delta.name, "")))
            pieces.append([])
        elif isinstance(delta, CallArguments):
            pieces[delta.index].append(delta.text)
    for call, texts in zip(calls, pieces, strict=True):
        call.function.arguments = "".join(texts)
    message = ChatMessage(content if content or not calls else None)
    message.reasoning_content = thought or UNSET
    message.tool_calls = calls or UNSET
    return message


def _id_of(call: CallBegin) -> str:
    return call.id or f"call_{uuid.uuid4().hex[:24]}"
