"""The only door: here a request's body becomes token ids and choices, or an error that names the field.

The order is fixed: bytes -> JSON -> fields served, refused or ignored -> strict types -> bounds -> prompts as tokens ->
fit of the context. Nothing behind this module checks a request again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from ...engine.errors import RequestError
from ...engine.text.token_ids import TokenIds
from ..errors import UnknownModelError
from ..parsers.formats import AnswerFormat
from ..state import ServerState
from ..wire.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    RequestModel,
    TokenizeRequest,
)
from .answer_grammar import Calls, Form, make_form
from .body import MAX_SHOWN_CHARS, drop_nulls, json_type, of_body, read_json
from .chat_format import answer_format, offered_tools
from .choices import AnswerLength, Choice, Scores, make_choices
from .fields import refuse_unless_neutral, split_fields
from .messages import read_messages
from .prompts import (
    Prompt,
    check_can_be_admitted,
    check_prompt,
    check_token_ids,
    encode_messages,
    read_prompts,
    tokenizing,
)
from .structured import read_asked
from .template_settings import read_settings
from .tools import STRICT, read_tool_choice, read_tools, strict_functions

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for completions
_INPUT_SHOULD = re.compile(r"^[A-Z][a-z]+ should")  # pydantic's "Input should", "String should" and others
STREAM_OPTION_NEUTRAL = {"include_obfuscation": (False,)}

R = TypeVar("R", bound=RequestModel)
G = TypeVar("G", bound=GenerationRequest)
C = TypeVar("C", bound=ChatRequest | TokenizeRequest)


@dataclass(frozen=True)
class Prepared(Generic[G]):
    """A request that can be served. `ignored`: names of its fields that change nothing. `answer`: how chat is read."""

    request: G
    prompts: list[Prompt]
    choices: list[Choice]
    ignored: list[str]
    answer: AnswerFormat = field(default_factory=AnswerFormat)

    @property
    def key(self) -> str:
        """The beginning of the engine's ids of all choices. The answer's id ends in it, and so leads to the log."""
        return self.choices[0].request.request_id.removesuffix("-0")


async def prepare_completion(http: Request, state: ServerState) -> Prepared[CompletionRequest]:
    body = await read_body(http, state)
    request, ignored = await of_body(http, lambda: _as_typed(body, state, CompletionRequest, ChatRequest))
    _check_generation(request, state)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens must be at least 1 without echo, got 0", "max_tokens")
    _check_logprobs("logprobs", request.logprobs, state)
    prompts = await read_prompts(request, state)
    check_can_be_admitted(len(prompts), request.n, state.llm.client.info)
    asked, unknown = read_asked(request)
    form = await make_form(asked, None, AnswerFormat(), state.grammars)
    length = AnswerLength("max_tokens", request.max_tokens, DEFAULT_MAX_TOKENS)
    scores = Scores(request.logprobs, request.logprobs if request.echo else None)
    choices = make_choices(request, state, prompts, length, scores, form=form)
    return Prepared(request, prompts, choices, _not_held([*ignored, *unknown], form))


async def prepare_chat(http: Request, state: ServerState) -> Prepared[ChatRequest]:
    return await prepare_conversation(await read_body(http, state), http, state)


async def prepare_conversation(
    body: dict[str, Any], http: Request, state: ServerState, left_out: Sequence[str] = ()
) -> Prepared[ChatRequest]:
    """`body`: that of a chat request, from any route. `left_out`: names of fields that the route left out of it."""
    request, ignored, template_kwargs = await of_body(
        http, lambda: _as_conversation(body, state, ChatRequest, CompletionRequest, left_out)
    )
    _check_generation(request, state)
    length = _read_chat_length(request)
    _check_logprobs("top_logprobs", request.top_logprobs, state)
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    tools = offered_tools(request, state)
    check_can_be_admitted(1, request.n, state.llm.client.info)
    prompt = await encode_messages(request, state, tools, template_kwargs)
    check_prompt(prompt.token_ids, state.llm.client.info, "messages")
    answer = answer_format(request, state, prompt.token_ids, tools)
    wanted, unknown = read_asked(request)
    form = await make_form(wanted, _calls(request, tools, body), answer, state.grammars)
    scores = Scores(request.top_logprobs if request.logprobs else None)
    choices = make_choices(request, state, [prompt], length, scores, answer, form)
    return Prepared(request, [prompt], choices, _not_held([*ignored, *unknown], form), answer)


def _calls(request: ChatRequest, tools: list[dict[str, Any]], body: dict[str, Any]) -> Calls | None:
    """The calls that the answer may have; None without tools. `body` still tells which functions are strict."""
    if not tools:
        return None
    return Calls(tools, read_tool_choice(request.tool_choice, tools), strict_functions(body["tools"]))


def _not_held(ignored: list[str], form: Form | None) -> list[str]:
    """`ignored` without what the grammar holds after all, and with the names of what it does not hold."""
    if form is None:
        return ignored
    held = f"tools[].{STRICT}" if form.holds_calls else None
    return [*(name for name in ignored if name != held), *form.left_out]


async def prepare_tokenize(http: Request, state: ServerState) -> tuple[TokenizeRequest, list[int], dict[str, str]]:
    body = await read_body(http, state)
    request, ignored, template_kwargs = await of_body(http, lambda: _as_conversation(body, state, TokenizeRequest))
    headers = state.tell_ignored(ignored)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("send exactly one of prompt and messages", "prompt")
    if request.tools and request.messages is None:
        raise RequestError("tools need messages", "tools")
    for name in ("reasoning_effort", "chat_template_kwargs"):
        if getattr(request, name) and request.messages is None:
            raise RequestError(f"{name} needs messages: a prompt has no template", name)
    if request.prompt is None:
        prompt = await encode_messages(request, state, request.tools, template_kwargs)
        return request, prompt.token_ids.tolist(), headers
    text, add_special_tokens = request.prompt, request.add_special_tokens is not False
    encode = state.llm.tokenizer.encode
    tokens = await tokenizing(len(text), state, lambda: encode(text, add_special_tokens, request.parse_special))
    return request, tokens, headers


async def prepare_detokenize(http: Request, state: ServerState) -> tuple[DetokenizeRequest, dict[str, str]]:
    body = await read_body(http, state)
    request, ignored = await of_body(http, lambda: _as_typed(body, state, DetokenizeRequest))
    check_token_ids(TokenIds(request.tokens), state.llm.client.info, "tokens")
    return request, state.tell_ignored(ignored)


async def read_body(http: Request, state: ServerState) -> dict[str, Any]:
    """The fields of a request that are not null. Raises `RequestError`."""
    return drop_nulls(await read_json(http, state.settings.max_body_depth))


def _as_typed(
    body: dict[str, Any],
    state: ServerState,
    model: type[R],
    foreign: type[RequestModel] | None = None,
    left_out: Sequence[str] = (),
) -> tuple[R, list[str]]:
    """The typed request, and the names of the fields left out of it, `left_out` first. Raises `RequestError`."""
    fields, unknown = split_fields(body, model.model_fields, foreign.model_fields if foreign else ())
    ignored = [*left_out, *unknown]
    if "stream_options" in fields:
        ignored += _clean_stream_options(fields)
    if "messages" in fields:
        fields["messages"], unknown = read_messages(fields["messages"])
        ignored += unknown
    if "tools" in fields:
        fields["tools"], unknown = read_tools(fields["tools"])
        ignored += unknown
    request = typed(model, fields)
    if request.model is not None and request.model != state.model_name:
        shown = request.model[:MAX_SHOWN_CHARS]
        raise UnknownModelError(f"the model {shown!r} is not served here; this is {state.model_name!r}", "model")
    return request, ignored


def _as_conversation(
    body: dict[str, Any],
    state: ServerState,
    model: type[C],
    foreign: type[RequestModel] | None = None,
    left_out: Sequence[str] = (),
) -> tuple[C, list[str], dict[str, Any]]:
    """`_as_typed`, and the values for the chat template. A setting that the template does not read is ignored."""
    request, ignored = _as_typed(body, state, model, foreign, left_out)
    inputs = state.llm.tokenizer.template_inputs
    template_kwargs, unread = read_settings(request.reasoning_effort, request.chat_template_kwargs, inputs)
    return request, [*ignored, *unread], template_kwargs


def typed(model: type[R], fields: dict[str, Any]) -> R:
    """Raises `RequestError` naming the first field of a wrong type."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _as_request_error(error) from None


def _clean_stream_options(fields: dict[str, Any]) -> list[str]:
    """Replace stream_options by its served part; return the names of undocumented options."""
    options = fields["stream_options"]
    if not isinstance(options, dict):
        raise RequestError(f"stream_options must be an object, got {json_type(options)}", "stream_options")
    served, unknown = {}, []
    for name, value in drop_nulls(options).items():
        if name in STREAM_OPTION_NEUTRAL:
            refuse_unless_neutral(f"stream_options.{name}", value, STREAM_OPTION_NEUTRAL[name])
        elif name in ("include_usage", "continuous_usage_stats"):
            served[name] = value
        else:
            unknown.append(f"stream_options.{name}")
    fields["stream_options"] = served
    return unknown


def _as_request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return RequestError(f"{where} is required", where)
    message = _INPUT_SHOULD.sub("must", first["msg"].removeprefix("Value error, ")).partition(" after validation")[0]
    shown = _shown(first["input"], counts=first["type"] == "too_long")
    return RequestError(f"{where}: {message[0].lower()}{message[1:]}, got {shown}", where)


def _shown(value: Any, *, counts: bool) -> str:
    """A value in an error message: short ones as JSON, others by length or type. `counts`: lists by their length."""
    if isinstance(value, (dict, list)):
        return str(len(value)) if counts else json_type(value)
    if isinstance(value, str) and len(value) > MAX_SHOWN_CHARS:
        return f"{len(value)} characters"
    return json.dumps(value)[:MAX_SHOWN_CHARS]


def _check_generation(request: GenerationRequest, state: ServerState) -> None:
    max_n = state.settings.max_n
    if request.n > max_n:
        raise RequestError(f"n must be at most {max_n} (setting max_n), got {request.n}", "n")
    _check_stop(request.stop, state)
    num_biases, max_biases = len(request.logit_bias or ()), state.settings.max_logit_bias
    if num_biases > max_biases:
        raise RequestError(
            f"logit_bias must have at most {max_biases} entries (setting max_logit_bias), got {num_biases}",
            "logit_bias",
        )
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    check_token_ids(TokenIds(request.stop_token_ids), state.llm.client.info, "stop_token_ids")


def _check_stop(stop: list[str], state: ServerState) -> None:
    max_strings, max_chars = state.settings.max_stop_strings, state.settings.max_stop_chars
    if len(stop) > max_strings:
        raise RequestError(
            f"stop must have at most {max_strings} strings (setting max_stop_strings), got {len(stop)}", "stop"
        )
    for text in stop:
        if not 0 < len(text) <= max_chars:
            raise RequestError(
                f"each stop string must have 1 to {max_chars} characters (setting max_stop_chars), got {len(text)}",
                "stop",
            )


def _check_logprobs(name: str, value: int | None, state: ServerState) -> None:
    bound = state.settings.max_logprobs
    if value is not None and not 0 <= value <= bound:
        raise RequestError(f"{name} must be in [0, {bound}] (setting max_logprobs), got {value}", name)


def _read_chat_length(request: ChatRequest) -> AnswerLength:
    """`max_completion_tokens`, or its older name `max_tokens`."""
    new, old = request.max_completion_tokens, request.max_tokens
    if new is not None and old is not None and new != old:
        raise RequestError(
            f"max_completion_tokens ({new}) and max_tokens ({old}) differ; send one of them",
            "max_completion_tokens",
        )
    name = "max_tokens" if new is None else "max_completion_tokens"
    value = old if new is None else new
    if value == 0:
        raise RequestError(f"{name} must be at least 1, got 0", name)
    return AnswerLength(name, value)
