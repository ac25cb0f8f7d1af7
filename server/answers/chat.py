"""Engine outputs -> OpenAI's chat completion objects, whole and in chunks."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from msgspec import UNSET, UnsetType

from ...engine.outputs import RequestOutput
from ..door.choices import Choice
from ..door.validation import Prepared
from ..parsers.answer import AnswerParser
from ..parsers.deltas import CallArguments, CallBegin, Content, Delta, Reasoning
from ..state import ServerState
from ..wire.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from ..wire.requests import ChatRequest
from .events import Event
from .logprobs import chat_logprobs, splice_chat_logprobs
from .pieces import Splicer
from .reader import AnswerReader
from .writer import AnswerWriter


class ChatWriter(AnswerWriter[ChatRequest]):
    """Engine outputs -> OpenAI's chat completion objects, for one request."""

    def __init__(self, state: ServerState, prepared: Prepared[ChatRequest]) -> None:
        super().__init__("chatcmpl-", state, prepared)
        self.prompt_token_ids = prepared.prompts[0].token_ids.tolist() if prepared.request.return_token_ids else []
        self.readers = [AnswerReader(prepared.answer.parser()) for _ in prepared.choices]

    def whole(self, outputs: list[Event]) -> list[bytes]:
        """The JSON of the answer in one object, from one merged output per choice."""
        splicer = Splicer()
        choices = [self._choice(choice, output, splicer) for choice, output in outputs]
        usage = self.usage.total()
        answer = ChatCompletion(self.id, "chat.completion", self.created, self.state.model_name, choices, usage)
        if self.request.return_token_ids:
            answer.prompt_token_ids = self.prompt_token_ids
        return splicer.encode(answer)

    def render(self, event: Event) -> Iterator[ChatChunk]:
        """The chunks of one output: the role first, then the deltas, then the finish reason in a chunk of its own."""
        choice, output = event
        reader = self.readers[choice.index]
        deltas = reader.read(output)
        self.usage.observe(choice, output, reader.num_reasoning_tokens)
        usage = self.usage.of_chunk(choice, output.num_output_tokens, reader.num_reasoning_tokens)
        if self.begins(choice.index):
            yield self._role_chunk(choice)
        for said in self._said(choice.index, output, deltas):
            yield self._chunk([said], usage)
        if output.finish_reason is not None:
            reason = finish_reason(reader.parser, output)
            yield self._chunk([ChatChunkChoice(choice.index, ChatDelta(), finish_reason=reason)], usage)

    def render_end(self) -> Iterator[ChatChunk]:
        if (usage := self.usage.at_end()) is not None:
            yield self._chunk([], usage)

    def _role_chunk(self, choice: Choice) -> ChatChunk:
        role = ChatChunkChoice(choice.index, ChatDelta(role="assistant", content=""))
        chunk = self._chunk([role], self.usage.of_chunk(choice, 0))
        if self.request.return_token_ids:
            chunk.prompt_token_ids = self.prompt_token_ids
        return chunk

    def _said(self, index: int, output: RequestOutput, read: list[Delta]) -> list[ChatChunkChoice]:
        """What was read in one output, as chunks. Log-probabilities and token ids go with the first of them."""
        logprobs: ChatLogprobs | None = None
        if self.request.logprobs and output.logprobs:
            logprobs = chat_logprobs(output.logprobs, self.request.top_logprobs, self.state.token_names)
        token_ids = output.token_ids if self.request.return_token_ids else UNSET
        deltas = [chunk_delta(delta) for delta in read]
        if not deltas and (logprobs or token_ids):
            deltas = [ChatDelta(content="")]
        choices = [ChatChunkChoice(index, delta) for delta in deltas]
        if choices:
            choices[0].logprobs, choices[0].token_ids = logprobs, token_ids
        return choices

    def _choice(self, choice: Choice, output: RequestOutput, splicer: Splicer) -> ChatChoice:
        reader = self.readers[choice.index]
        message = whole_message(reader.read(output))
        self.usage.observe(choice, output, reader.num_reasoning_tokens)
        logprobs: ChatLogprobs | None = None
        if self.request.logprobs:
            entries, num_top = output.logprobs or [], self.request.top_logprobs
            logprobs = splice_chat_logprobs(splicer, entries, num_top, self.state.token_names)
        written = ChatChoice(choice.index, message, logprobs, finish_reason(reader.parser, output))
        if self.request.return_token_ids:
            written.token_ids = output.token_ids
        return written

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(self.id, "chat.completion.chunk", self.created, self.state.model_name, choices, usage)


def finish_reason(parser: AnswerParser, output: RequestOutput) -> ChatFinishReason:
    """The finish reason of an answer whose last output is `output`."""
    if output.finish_reason != "stop":
        return "length"
    return "tool_calls" if parser.num_calls else "stop"


def chunk_delta(delta: Delta) -> ChatDelta:
    """A delta in OpenAI's shape. A call comes as its name first, then as pieces of its arguments."""
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
