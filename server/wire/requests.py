"""The requests, as strict pydantic types. `door.validation` checks bounds that depend on settings or on the model.

Names and meanings are OpenAI's; those marked vLLM are its extensions. The answers are in `answers` and `service`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...engine.sampling_params import MAX_LOGPROBS
from .schemas import (
    INT32_MAX,
    INT64_MAX,
    MAX_CACHE_SALT_CHARS,
    MAX_N,
    Effort,
    LogitBias,
    MessagesInput,
    NumTokens,
    PromptInput,
    ResponseFormatInput,
    SessionId,
    StopStrings,
    StructuredInput,
    TokenIds,
    ToolChoiceInput,
    ToolsInput,
)

ToolMode = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class ToolChoice:
    """`name`: the only function that may be called. "required" without a name: at least one call of any function."""

    mode: ToolMode
    name: str | None = None


def _within(low: int, high: int, *, open_low: bool = False, default: Any = None) -> Any:
    """A field whose bounds the document tells, and `SamplingParams` and `validation` check."""
    return Field(default, json_schema_extra={"exclusiveMinimum" if open_low else "minimum": low, "maximum": high})


STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class RequestModel(BaseModel):
    """A body without nulls and without unknown fields. A field's docstring is its description in `/openapi.json`."""

    model_config = STRICT

    model: str | None = None
    """Name of the served model, as /v1/models lists it; left out, it is that one."""


class StreamOptions(BaseModel):
    model_config = STRICT

    include_usage: bool = False
    """A last chunk tells the tokens that were used."""
    continuous_usage_stats: bool = False
    """Every chunk tells them (vLLM)."""


class SamplingRequest(RequestModel):
    """What every generation route shares."""

    stream: bool = False
    """Send the answer as server-sent events while it is written."""
    temperature: float | None = _within(0, 100)
    """0 takes the likeliest token; left out, the checkpoint's default or 1."""
    top_p: float | None = _within(0, 1, open_low=True)
    """Draw among the likeliest tokens that together have this probability."""
    presence_penalty: float = _within(-2, 2, default=0.0)
    """Subtracted from the logit of every token that the answer has already."""
    frequency_penalty: float = _within(-2, 2, default=0.0)
    """Subtracted from a token's logit for each time that the answer has it already."""
    logit_bias: LogitBias | None = None
    """Token id to a number from -100 to 100, which is added to its logit."""
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    """Equal seeds draw equal tokens, whatever else runs."""
    stop: StopStrings = []
    """A text, or several, at which the answer ends; it is not part of the answer."""
    top_k: int | None = _within(-1, INT32_MAX)
    """Draw among so many of the likeliest tokens; 0 or -1 = all (vLLM)."""
    min_p: float | None = _within(0, 1)
    """Draw among tokens at least this share as likely as the likeliest (vLLM)."""
    repetition_penalty: float | None = _within(0, 100, open_low=True)
    """Above 1, tokens of prompt and answer become less likely (vLLM)."""
    min_tokens: NumTokens = 0
    """Tokens before an end or a stop may come (vLLM)."""
    ignore_eos: bool = False
    """Go on after the model has ended its answer (vLLM)."""
    stop_token_ids: TokenIds = Field([], max_length=256)
    """Ids of tokens that end the answer (vLLM)."""
    skip_special_tokens: bool = True
    """Leave control tokens out of the text (vLLM)."""
    include_stop_str_in_output: bool = False
    """Leave the stop string at the end of the text (vLLM)."""
    priority: int = Field(0, ge=-INT32_MAX, le=INT32_MAX)
    """Lower is computed earlier; requests of one priority share the steps (vLLM)."""
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_CACHE_SALT_CHARS)
    """Only requests with the same salt share what the prefix cache holds (vLLM)."""
    prefix_cache: bool = True
    """False takes nothing from the prefix cache and leaves nothing there."""
    session_id: SessionId | None = None
    """Name under which the conversation's end can be saved; without sessions it only says where a request belongs."""


class GenerationRequest(SamplingRequest):
    """What completions and chat share."""

    n: int = Field(1, ge=1, json_schema_extra={"maximum": MAX_N})
    """Answers to each prompt."""
    stream_options: StreamOptions | None = None
    """What a stream tells beside the text."""
    response_format: ResponseFormatInput = None
    """Form of the answer: text, any JSON object, or JSON that follows a schema."""
    structured_outputs: StructuredInput = None
    """Form of the answer: one of json, json_object, regex, choice and grammar (vLLM)."""
    return_token_ids: bool = False
    """Tell the ids of the tokens, of the prompt too (vLLM)."""


class CompletionRequest(GenerationRequest):
    prompt: PromptInput
    """A text, a list of texts, a list of token ids or a list of such lists."""
    max_tokens: NumTokens | None = None
    """Longest answer; left out, 16 or what the context has left."""
    echo: bool = False
    """Begin the text with the prompt; with logprobs, tell those of the prompt's tokens."""
    logprobs: int | None = _within(0, MAX_LOGPROBS)
    """Tell the log-probability of each token and of so many alternatives."""
    add_special_tokens: bool = True
    """Put around the prompt what the tokenizer puts there, such as a token of beginning (vLLM)."""
    parse_special: bool = False
    """Control tokens that the prompt spells are those tokens, and not text (llama.cpp)."""


class ChatRequest(GenerationRequest):
    messages: MessagesInput
    """The conversation: roles system, developer, user, assistant and tool, with text."""
    tools: ToolsInput = None
    """Functions that the model may call."""
    tool_choice: ToolChoiceInput = None
    """auto, none, required, or the one function that has to be called; left out, auto where there are tools."""
    parallel_tool_calls: bool = True
    """False keeps the answer to one call."""
    max_tokens: NumTokens | None = None
    """Longest answer, the older name of max_completion_tokens."""
    max_completion_tokens: NumTokens | None = None
    """Longest answer, thoughts included; left out, what the context has left."""
    logprobs: bool = False
    """Tell the log-probability of each token."""
    top_logprobs: int = _within(0, MAX_LOGPROBS, default=0)
    """Alternatives that are told for each token; needs logprobs."""
    add_generation_prompt: bool | None = None
    """End the prompt where an answer begins; left out, true unless continue_final_message (vLLM)."""
    continue_final_message: bool = False
    """Continue the last message instead of answering it (vLLM)."""
    reasoning_effort: Effort | None = None
    """How much the model should think, for templates that read it."""
    chat_template_kwargs: dict[str, Any] = {}
    """Values for names that the chat template reads, such as enable_thinking (vLLM)."""
    stop_in_reasoning: bool = False
    """Stop strings count in the thought, too, and not in the answer alone."""


class TokenizeRequest(RequestModel):
    """vLLM's /tokenize: a prompt or messages."""

    prompt: str | None = None
    """Text to tokenize; or messages."""
    messages: MessagesInput = None
    """Conversation to render by the chat template and tokenize."""
    tools: ToolsInput = None
    """Functions that the template shows."""
    add_special_tokens: bool | None = None
    """Put around the prompt what the tokenizer puts there; left out, true for a prompt."""
    parse_special: bool = False
    """Control tokens that the prompt spells are those tokens, and not text (llama.cpp)."""
    add_generation_prompt: bool | None = None
    """End where an answer begins; left out, true unless continue_final_message."""
    continue_final_message: bool = False
    """Leave the last message open."""
    reasoning_effort: Effort | None = None
    """As in a chat request."""
    chat_template_kwargs: dict[str, Any] = {}
    """As in a chat request."""
    return_token_strs: bool = False
    """Tell each token as text, too."""


class DetokenizeRequest(RequestModel):
    tokens: TokenIds
    """Ids to turn into text."""
