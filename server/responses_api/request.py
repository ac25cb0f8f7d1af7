"""The body of /v1/responses -> a chat request.

Bounds and errors are those of chat; an error has the name of the field that the client sent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema
from starlette.requests import Request

from ...engine.errors import RequestError
from ...engine.sampling_params import MAX_LOGPROBS, SamplingParams
from ..door.body import MAX_SHOWN_CHARS, drop_nulls, of_body, require_type
from ..door.fields import NEUTRAL_VALUES, refuse_unless_neutral, split_fields
from ..door.validation import Prepared, prepare_conversation, read_body, typed
from ..errors import UnsupportedParameterError
from ..state import ServerState
from ..wire.requests import ChatRequest, CompletionRequest, SamplingRequest
from ..wire.schemas import FUNCTION_FIELDS, INT32_MAX, MAX_TOOLS, ToolChoiceInput
from .input import Conversation, FieldNames
from .tools import read_tool_choice, read_tools, repeated_tools
from .wire import Settings

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"  # not needed: thoughts come as plain text
TEXT_FORMAT = {"type": "text"}
MAX_METADATA = 16  # OpenAI's
MAX_INCLUDED = 16
# Fields documented for this route or another one, and not served here -> their values that ask for nothing.
RESPONSES_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = NEUTRAL_VALUES | {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "logprobs": (False,),
    "max_tool_calls": (),
    "n": (1,),
    "previous_response_id": (),
    "prompt": (),
    "return_token_ids": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
}
# Values of `include` for items of OpenAI's server tools, of which there are none here.
NOT_MADE = (
    ENCRYPTED,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)

InputItems = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "object"}}]}),
]
ResponsesTools = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": {
                "type": "object",
                "required": ["type"],
                "properties": {"type": {"type": "string"}, **FUNCTION_FIELDS, "format": {"type": ["object", "null"]}},
            },
        }
    ),
]


class ResponsesRequest(SamplingRequest):
    input: InputItems
    """A text, or the conversation as items."""
    instructions: str | None = None
    """System message before the input."""
    max_output_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    """Longest answer, thoughts included; left out, what the context has left."""
    include: list[str] = Field([], max_length=MAX_INCLUDED)
    """What the response shall hold beyond its default."""
    top_logprobs: int = Field(0, json_schema_extra={"minimum": 0, "maximum": MAX_LOGPROBS})
    """Alternatives that are told for each token; include has to ask for them."""
    text: dict[str, Any] = Field({})
    """format: text, any JSON object, or JSON that follows a schema."""
    tools: ResponsesTools = None
    """Functions and custom tools that the model may call; tools of other types are left out and named."""
    tool_choice: ToolChoiceInput = None
    """auto, none, required, or the one function that has to be called; left out, auto where there are tools."""
    parallel_tool_calls: bool = True
    """False keeps the answer to one call."""
    reasoning: dict[str, Any] = Field({})
    """effort: how much the model should think, for templates that read it."""
    chat_template_kwargs: dict[str, Any] = Field({})
    """Values for names that the chat template reads (vLLM)."""
    stop_in_reasoning: bool = False
    """Stop strings count in the thought, too, and not in the answer alone."""
    metadata: dict[str, str] = Field({}, max_length=MAX_METADATA)
    """Repeated in the response."""
    user: str | None = None
    """Repeated in the response."""

    def settings(self, model_name: str, params: SamplingParams) -> Settings:
        """The fields of the request that the response repeats."""
        return Settings(
            model=model_name,
            instructions=self.instructions,
            max_output_tokens=self.max_output_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_logprobs=self.top_logprobs,
            text={"format": self.text.get("format") or TEXT_FORMAT},
            tools=repeated_tools(self.tools),
            tool_choice=self.tool_choice or "auto",
            parallel_tool_calls=self.parallel_tool_calls,
            metadata=self.metadata,
            user=self.user,
            reasoning={"effort": self.reasoning.get("effort"), "summary": None},
        )


@dataclass(frozen=True)
class PreparedResponse:
    """A request that can be served."""

    request: ResponsesRequest
    chat: Prepared[ChatRequest]


async def prepare_response(http: Request, state: ServerState) -> PreparedResponse:
    foreign = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    body = await read_body(http, state)
    fields, ignored = split_fields(body, ResponsesRequest.model_fields, foreign, RESPONSES_NEUTRAL_VALUES)
    request = await of_body(http, lambda: typed(ResponsesRequest, fields))
    names = FieldNames()
    chat_body, unknown = await of_body(http, lambda: _as_chat(request, names))
    try:
        chat = await prepare_conversation(chat_body, http, state, ignored + unknown)
    except RequestError as error:
        raise names.renamed(error) from None
    choices = [replace(choice, form_field=names.of(choice.form_field)) for choice in chat.choices]
    left_out = [_renamed(name, names) for name in chat.ignored]
    return PreparedResponse(request, replace(chat, choices=choices, ignored=left_out))


def _renamed(ignored: str, names: FieldNames) -> str:
    """The client's name of an ignored field that has chat's name; other names are the client's already."""
    is_ours = ignored.startswith(("response_format.", "tools[", "reasoning_effort"))
    return names.of(ignored).replace("tools[].function.", "tools[].") if is_ours else ignored


def _as_chat(request: ResponsesRequest, names: FieldNames) -> tuple[dict[str, Any], list[str]]:
    """The body of a chat request, and the names of the undocumented fields. Raises `RequestError`."""
    shared = request.model_fields_set & ChatRequest.model_fields.keys()
    body = {name: getattr(request, name) for name in sorted(shared)}
    conversation = Conversation(names)
    if request.instructions is not None:
        conversation.add_text("system", request.instructions, "instructions")
    if isinstance(request.input, str):
        conversation.add_text("user", request.input, "input")
    else:
        conversation.add_items(request.input)
    response_format, unknown = _read_text(request.text)
    with_logprobs, not_made = _read_include(request)
    tools, left_out = read_tools(request.tools, names)
    effort, unread = _read_reasoning(request.reasoning)
    body |= {
        "messages": conversation.messages,
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": with_logprobs,
        "response_format": response_format,
        "tools": tools,
        "tool_choice": read_tool_choice(request.tool_choice),
        "reasoning_effort": effort,
    }
    return drop_nulls(body), [*conversation.unknown, *unknown, *not_made, *left_out, *unread]


def _read_include(request: ResponsesRequest) -> tuple[bool, list[str]]:
    """(whether log-probabilities are asked for, the names of values that are left out). Raises `RequestError`."""
    for index, name in enumerate(request.include):
        if name != LOGPROBS and name not in NOT_MADE:
            where = f"include[{index}]"
            message = f"{where} must be one of {', '.join((LOGPROBS, *NOT_MADE))}, got {name[:MAX_SHOWN_CHARS]!r}"
            raise UnsupportedParameterError(message, where)
    with_logprobs = LOGPROBS in request.include
    if request.top_logprobs and not with_logprobs:
        raise RequestError(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")
    return with_logprobs, [f"include.{name}" for name in NOT_MADE if name in request.include]


def _read_reasoning(settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """(chat's `reasoning_effort`, the names of settings that change nothing, such as a summary)."""
    given = drop_nulls(settings)
    return given.pop("effort", None), [f"reasoning.{name}" for name in given]


def _read_text(text: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """(chat's `response_format`, the names of the undocumented fields). Raises `RequestError`."""
    unknown = []
    for name, value in drop_nulls(text).items():
        if name == "verbosity":
            refuse_unless_neutral("text.verbosity", value, NEUTRAL_VALUES["verbosity"])
        elif name != "format":
            unknown.append(f"text.{name}")
    if text.get("format") is None:
        return None, unknown
    value = require_type(text["format"], dict, "text.format")
    if value.get("type") != "json_schema":
        return value, unknown
    schema = {name: entry for name, entry in value.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}, unknown
