"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ...engine.outputs import RequestOutput
from ..answers.chat import chunk_delta, finish_reason, read_deltas, whole_message
from ..answers.generation import Event, collect, generate, num_chars, traced, unless_disconnected
from ..answers.logprobs import chat_logprobs, splice_chat_logprobs
from ..answers.pieces import PiecedResponse, Splicer
from ..answers.streaming import EventStream
from ..answers.usage import UsageCounter
from ..door.choices import Choice
from ..door.validation import Prepared, prepare_chat
from ..off_loop import off_loop
from ..state import ServerState, refuse_unless_ready
from ..wire.answers import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from ..wire.document import GENERATING, documented
from ..wire.requests import ChatRequest

router = APIRouter()


@router.post("/v1/chat/completions", **documented(ChatCompletion, *GENERATING, body=ChatRequest, chunk=ChatChunk))
async def create_chat_completion(http: Request) -> Response:
    """Answer a conversation, laid out by the checkpoint's own chat template."""
    refuse_unless_ready(http)
    prepared = await prepare_chat(http)
    writer = ChatWriter(ServerState.of(http), prepared)
    headers = writer.state.tell_ignored(prepared.ignored)
    events = traced(http, prepared, writer.id, generate(writer.state, prepared.choices))
    if not prepared.request.stream:
        outputs = await unless_disconnected(http.receive, collect(events))
        cost = sum(num_chars(output) for _, output in outputs)
        return await off_loop(cost, lambda: PiecedResponse(writer.whole(outputs), headers))
    return EventStream(events, writer.render, writer.render_end, headers)


class ChatWriter:
    """Engine outputs -> OpenAI's chat completion objects, for one request."""

    def __init__(self, state: ServerState, prepared: Prepared[ChatRequest]) -> None:
        self.id = f"chatcmpl-{prepared.key}"
        self.state = state
        self.request = prepared.request
        self.prompt_token_ids = prepared.prompts[0].token_ids.tolist() if prepared.request.return_token_ids else []
        self.created = int(time.time())
        self.usage = UsageCounter(prepared.prompts, len(prepared.choices), prepared.request.stream_options)
        self.is_begun = [False] * len(prepared.choices)
        self.parsers = [prepared.answer.parser() for _ in prepared.choices]

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
        """The chunks of one output: the role before anything else, what is said, and the finish reason by itself."""
        choice, output = event
        self.usage.observe(choice, output)
        usage = self.usage.of_chunk(choice, output.num_output_tokens)
        if not self.is_begun[choice.index]:
            self.is_begun[choice.index] = True
            yield self._role_chunk(choice)
        for said in self._said(choice.index, output):
            yield self._chunk([said], usage)
        if output.finish_reason is not None:
            reason = finish_reason(self.parsers[choice.index], output)
            yield self._chunk([ChatChunkChoice(choice.index, ChatDelta(), finish_reason=reason)], usage)

    def render_end(self) -> Iterator[ChatChunk]:
        options = self.request.stream_options
        if options is not None and options.include_usage:
            yield self._chunk([], self.usage.total())

    def _role_chunk(self, choice: Choice) -> ChatChunk:
        role = ChatChunkChoice(choice.index, ChatDelta(role="assistant", content=""))
        chunk = self._chunk([role], self.usage.of_chunk(choice, 0))
        if self.request.return_token_ids:
            chunk.prompt_token_ids = self.prompt_token_ids
        return chunk

    def _said(self, index: int, output: RequestOutput) -> list[ChatChunkChoice]:
        """What one output says. Its log-probabilities and ids go with the first piece."""
        logprobs: ChatLogprobs | None = None
        if self.request.logprobs and output.logprobs:
            logprobs = chat_logprobs(output.logprobs, self.request.top_logprobs, self.state.token_names)
        token_ids = output.token_ids if self.request.return_token_ids else UNSET
        deltas = [chunk_delta(delta) for delta in read_deltas(self.parsers[index], output)]
        if not deltas and (logprobs or token_ids):
            deltas = [ChatDelta(content="")]
        choices = [ChatChunkChoice(index, delta) for delta in deltas]
        if choices:
            choices[0].logprobs, choices[0].token_ids = logprobs, token_ids
        return choices

    def _choice(self, choice: Choice, output: RequestOutput, splicer: Splicer) -> ChatChoice:
        self.usage.observe(choice, output)
        parser = self.parsers[choice.index]
        message = whole_message(read_deltas(parser, output))
        logprobs: ChatLogprobs | None = None
        if self.request.logprobs:
            entries, num_top = output.logprobs or [], self.request.top_logprobs
            logprobs = splice_chat_logprobs(splicer, entries, num_top, self.state.token_names)
        written = ChatChoice(choice.index, message, logprobs, finish_reason(parser, output))
        if self.request.return_token_ids:
            written.token_ids = output.token_ids
        return written

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(self.id, "chat.completion.chunk", self.created, self.state.model_name, choices, usage)
