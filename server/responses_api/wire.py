"""What /v1/responses writes: the response, its output items and the events of its stream, exactly OpenAI's keys.

A struct's tag is its `type`, and an event's also the name of its frame.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, field

from ..wire.answers import ChatTokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Struct, tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class ReasoningText(Struct, tag="reasoning_text"):
    text: str


class ReasoningItem(Struct, tag="reasoning"):
    id: str
    content: list[ReasoningText]
    status: ItemStatus
    summary: list[Any] = []


class MessageItem(Struct, tag="message"):
    id: str
    content: list[OutputText]
    status: ItemStatus
    role: Literal["assistant"] = "assistant"


class FunctionCallItem(Struct, tag="function_call"):
    """`arguments` is JSON as the model wrote it: a client has to check it."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class CustomCallItem(Struct, tag="custom_tool_call"):
    """A call whose input is text."""

    id: str
    call_id: str
    name: str
    input: str
    status: ItemStatus


Part = OutputText | ReasoningText
OutputItem = ReasoningItem | MessageItem | FunctionCallItem | CustomCallItem


class InputTokensDetails(Struct):
    """`cache_write_tokens` are those of a cache that a request has to ask for, which there is not."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens"]


class ResponseFailure(Struct):
    code: Literal["server_error"]
    message: str


class Settings(Struct):
    """What was asked for, with the defaults that hold where nothing was."""

    model: str
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    metadata: dict[str, str]
    user: str | None
    background: Literal[False] = False
    max_tool_calls: None = None
    previous_response_id: None = None
    reasoning: dict[str, str | None] = field(default_factory=lambda: {"effort": None, "summary": None})
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"


class ResponseObject(Settings, kw_only=True):
    id: str
    created_at: int
    status: ResponseStatus
    output: list[OutputItem]
    completed_at: int | None = None
    usage: ResponseUsage | None = None
    incomplete_details: IncompleteDetails | None = None
    error: ResponseFailure | None = None
    object: Literal["response"] = "response"


class ResponseEvent(Struct, kw_only=True):
    """The writer numbers events as they leave, from 0."""

    sequence_number: int = 0


class _OfResponse(ResponseEvent, kw_only=True):
    response: ResponseObject


class Created(_OfResponse, tag="response.created"):
    pass


class InProgress(_OfResponse, tag="response.in_progress"):
    pass


class Completed(_OfResponse, tag="response.completed"):
    pass


class Incomplete(_OfResponse, tag="response.incomplete"):
    pass


class Failed(_OfResponse, tag="response.failed"):
    pass


class ErrorEvent(ResponseEvent, tag="error", kw_only=True):
    message: str
    code: str | None
    param: str | None


class _OfItem(ResponseEvent, kw_only=True):
    output_index: int


class ItemAdded(_OfItem, tag="response.output_item.added", kw_only=True):
    item: OutputItem


class ItemDone(_OfItem, tag="response.output_item.done", kw_only=True):
    item: OutputItem


class _InItem(_OfItem, kw_only=True):
    item_id: str


class ArgumentsDelta(_InItem, tag="response.function_call_arguments.delta", kw_only=True):
    delta: str


class ArgumentsDone(_InItem, tag="response.function_call_arguments.done", kw_only=True):
    name: str
    arguments: str


class CustomInputDelta(_InItem, tag="response.custom_tool_call_input.delta", kw_only=True):
    delta: str


class CustomInputDone(_InItem, tag="response.custom_tool_call_input.done", kw_only=True):
    input: str


class _InPart(_InItem, kw_only=True):
    content_index: int = 0  # an item has one part


class PartAdded(_InPart, tag="response.content_part.added", kw_only=True):
    part: Part


class PartDone(_InPart, tag="response.content_part.done", kw_only=True):
    part: Part


class TextDelta(_InPart, tag="response.output_text.delta", kw_only=True):
    delta: str
    logprobs: list[ChatTokenLogprob]


class TextDone(_InPart, tag="response.output_text.done", kw_only=True):
    text: str
    logprobs: list[ChatTokenLogprob]


class ReasoningDelta(_InPart, tag="response.reasoning_text.delta", kw_only=True):
    delta: str


class ReasoningDone(_InPart, tag="response.reasoning_text.done", kw_only=True):
    text: str


StreamEvent = (
    Created
    | InProgress
    | Completed
    | Incomplete
    | Failed
    | ErrorEvent
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
    | CustomInputDelta
    | CustomInputDone
)
