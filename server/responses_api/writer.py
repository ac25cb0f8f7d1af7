"""Engine outputs -> the events of a response. The last event holds the whole response."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import aclosing
from functools import partial

import msgspec

from ...engine.outputs import RequestOutput
from ..answers.events import Event, Events
from ..answers.generation import num_chars
from ..answers.logprobs import TOKENS_AT_ONCE, chat_logprobs
from ..answers.reader import AnswerReader
from ..answers.writer import AnswerWriter
from ..door.validation import Prepared
from ..errors import ApiError
from ..off_loop import off_loop
from ..parsers.deltas import CallArguments, CallBegin, Content, Delta
from ..state import ServerState
from ..wire.requests import ChatRequest
from .items import (
    GrowingCall,
    GrowingCustomCall,
    GrowingItem,
    GrowingMessage,
    GrowingReasoning,
    Logprobs,
)
from .request import ResponsesRequest
from .tools import custom_names
from .wire import (
    Completed,
    Created,
    ErrorEvent,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputTokensDetails,
    ItemStatus,
    OutputItem,
    OutputTokensDetails,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
    ResponseStatus,
    ResponseUsage,
    Settings,
)


class ResponseWriter(AnswerWriter[ChatRequest]):
    """Writes one response. A whole answer is the last event of its stream."""

    def __init__(self, state: ServerState, asked: ResponsesRequest, prepared: Prepared[ChatRequest]) -> None:
        super().__init__("resp_", state, prepared)
        self.response = self._make(
            "in_progress", asked.settings(state.model_name, prepared.choices[0].request.sampling_params)
        )
        self._token_names = state.token_names
        self._num_top = asked.top_logprobs
        self._reader = AnswerReader(prepared.answer.parser())
        self._custom_names = custom_names(asked.tools)
        self._growing: GrowingItem | None = None
        self._output: list[OutputItem] = []
        self._logprobs: Logprobs = []  # of tokens that no message has shown yet
        self._num_events = 0
        self.num_chars = 0  # cost of writing the whole answer, in the unit of `off_loop`

    async def whole(self, events: Events) -> ResponseObject:
        async with aclosing(events) as closing:
            async for choice, output in closing:
                for part in output.cut(TOKENS_AT_ONCE):
                    await off_loop(num_chars(part), partial(self._take_in, (choice, part)))
        return self.response

    def _take_in(self, event: Event) -> None:
        for _ in self.render(event):
            pass

    def render(self, event: Event) -> Iterator[ResponseEvent]:
        """The events of one output. Behind the last output's events comes the event with the whole response."""
        self.num_chars += num_chars(event[1])
        yield from self._numbered(self._events(event))

    def render_failure(self, error: ApiError) -> Iterator[ResponseEvent]:
        """The last events of a stream that fails: the error, and the response so far."""
        yield from self._numbered(self._failure_events(error))

    def _numbered(self, events: Iterator[ResponseEvent]) -> Iterator[ResponseEvent]:
        for event in events:
            event.sequence_number = self._num_events
            self._num_events += 1
            yield event

    def _events(self, event: Event) -> Iterator[ResponseEvent]:
        self.usage.observe(*event)
        output = event[1]
        yield from self._begin()
        self._logprobs += chat_logprobs(output.logprobs or [], self._num_top, self._token_names).content
        for delta in self._reader.read(output):
            yield from self._take(delta)
        if output.finish_reason is not None:
            yield from self._finish(output)

    def _begin(self) -> Iterator[ResponseEvent]:
        if self.begins(0):
            yield Created(response=self.response)
            yield InProgress(response=self.response)

    def _take(self, delta: Delta) -> Iterator[ResponseEvent]:
        match delta:
            case CallBegin():
                call = GrowingCustomCall if delta.name in self._custom_names else GrowingCall
                yield from self._grow(call(self._next_index, delta.name, delta.id))
                return
            case CallArguments():
                assert self._growing is not None
                yield from self._growing.add(delta.text, [])
                return
            case Content():
                kind: type[GrowingItem] = GrowingMessage
            case _:
                kind = GrowingReasoning
        if not isinstance(self._growing, kind):
            yield from self._grow(kind(self._next_index))
        assert self._growing is not None
        yield from self._growing.add(delta.text, self._take_logprobs() if kind is GrowingMessage else [])

    def _take_logprobs(self) -> Logprobs:
        logprobs, self._logprobs = self._logprobs, []
        return logprobs

    @property
    def _next_index(self) -> int:
        return len(self._output) + (self._growing is not None)

    def _grow(self, item: GrowingItem) -> Iterator[ResponseEvent]:
        """End the growing item, if there is one, and begin `item`."""
        yield from self._end_item("completed")
        self._growing = item
        yield from item.begin()

    def _end_item(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        if self._growing is not None:
            yield from self._growing.end(status)
            self._output.append(self._growing.item(status))
            self._growing = None

    def _finish(self, output: RequestOutput) -> Iterator[ResponseEvent]:
        is_complete = output.finish_reason == "stop"
        status: ItemStatus = "completed" if is_complete else "incomplete"
        if not self._next_index:  # an empty answer
            yield from self._grow(GrowingMessage(0))
        if isinstance(self._growing, GrowingMessage) and self._logprobs:  # of tokens without text, such as the last one
            yield from self._growing.add("", self._take_logprobs())
        yield from self._end_item(status)
        self.response = self._now(status)
        self.response.usage = self._usage()
        if is_complete:
            self.response.completed_at = int(time.time())
            yield Completed(response=self.response)
        else:
            self.response.incomplete_details = IncompleteDetails("max_output_tokens")
            yield Incomplete(response=self.response)

    def _failure_events(self, error: ApiError) -> Iterator[ResponseEvent]:
        yield from self._begin()
        yield ErrorEvent(message=error.message, code=error.reason, param=error.param)
        failed = self._now("failed")
        failed.error = ResponseFailure("server_error", error.message)
        if self._growing is not None:
            failed.output.append(self._growing.item("incomplete"))
        yield Failed(response=failed)

    def _make(self, status: ResponseStatus, settings: Settings) -> ResponseObject:
        return ResponseObject(
            id=self.id, created_at=self.created, status=status, output=[], **msgspec.structs.asdict(settings)
        )

    def _now(self, status: ResponseStatus) -> ResponseObject:
        return msgspec.structs.replace(self.response, status=status, output=list(self._output))

    def _usage(self) -> ResponseUsage:
        used = self.usage.total()
        return ResponseUsage(
            used.prompt_tokens,
            InputTokensDetails(used.prompt_tokens_details.cached_tokens),
            used.completion_tokens,
            OutputTokensDetails(self._reader.num_reasoning_tokens),
            used.total_tokens,
        )
