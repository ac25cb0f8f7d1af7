"""The requests, as strict pydantic types. Bounds that depend on settings or on the model are checked in `validation`.

Responses are in `responses`. Names and meanings are OpenAI's; those marked vLLM are its extensions.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema

from ..configs.schema import ServerConfig
from ..engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOP_STRINGS
from ..engine.session_folder import SESSION_ID, SESSION_ID_FORM
from .template_settings import Effort
from .tools import MAX_TOOLS, NAME

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_CACHE_SALT_CHARS = 256
# What the document says; the settings may say otherwise, and `validation` asks them.
MAX_N = ServerConfig.model_fields["max_n"].default
MAX_PROMPTS = ServerConfig.model_fields["max_prompts"].default


def _bound_entries(value: Any) -> Any:
    """Before each entry is looked at."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must have at most {MAX_LOGIT_BIAS} entries, has {len(value)}")
    return value


def _require_session_id(value: str) -> str:
    if not SESSION_ID.fullmatch(value):
        raise ValueError(f"must be {SESSION_ID_FORM}")
    return value


SESSION_ID_SCHEMA = {"type": "string", "pattern": f"^{SESSION_ID.pattern}$"}
SessionId = Annotated[str, AfterValidator(_require_session_id), WithJsonSchema(SESSION_ID_SCHEMA)]
STOP_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
TOKEN_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX}}
NumTokens = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], FailFast()]
StopStrings = Annotated[
    list[str],
    FailFast(),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema(
        {"anyOf": [STOP_STRING_SCHEMA, {"type": "array", "items": STOP_STRING_SCHEMA, "maxItems": MAX_STOP_STRINGS}]}
    ),
]
LogitBias = Annotated[
    dict[str, float],
    BeforeValidator(_bound_entries),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": r"^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
PromptInput = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}},
                TOKEN_IDS_SCHEMA,
                {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": TOKEN_IDS_SCHEMA},
            ]
        }
    ),
]
MessagesInput = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                    "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
                    "reasoning_content": {"type": "string"},
                    "tool_call_id": {"type": "string"},
                    "tool_calls": {"type": "array", "items": {"type": "object"}},
                },
            },
        }
    ),
]

FUNCTION_FIELDS = {
    "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
    "description": {"type": ["string", "null"]},
    "parameters": {"type": ["object", "null"]},
    "strict": {"type": ["boolean", "null"]},
}
ToolsInput = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "array",
            "maxItems": MAX_TOOLS,
            "items": {
                "type": "object",
                "required": ["type", "function"],
                "properties": {
                    "type": {"enum": ["function"]},
                    "function": {
                        "type": "object",
                        "required": ["name"],
                        "properties": FUNCTION_FIELDS,
                    },
                },
            },
        }
    ),
]
ToolChoiceInput = Annotated[
    Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]})
]
ResponseFormatInput = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "required": ["type"],
                    "properties": {
                        "type": {"enum": ["text", "json_object"]},
                        "schema": {"type": ["object", "null"]},  # of json_object
                    },
                },
                {
                    "type": "object",
                    "required": ["type", "json_schema"],
                    "properties": {
                        "type": {"enum": ["json_schema"]},
                        "json_schema": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {
                                "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
                                "schema": {"type": ["object", "null"]},
                                "strict": {"type": ["boolean", "null"]},
                            },
                        },
                    },
                },
            ]
        }
    ),
]
StructuredInput = Annotated[
    Any,
    WithJsonSchema(
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
            "properties": {
                "json": {"anyOf": [{"type": "object"}, {"type": "string"}]},
                "json_object": {"const": True},
                "regex": {"type": "string"},
                "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "grammar": {"type": "string"},
            },
        }
    ),
]


def _within(low: int, high: int, *, open_low: bool = False, default: Any = None) -> Any:
    """A field whose bounds `SamplingParams` and `validation` check, and the document tells."""
    return Field(default, json_schema_extra={"exclusiveMinimum" if open_low else "minimum": low, "maximum": high})


class RequestModel(BaseModel):
    """A body without nulls and without unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM: usage on every chunk


class SamplingRequest(RequestModel):
    """What every generation route shares."""

    stream: bool = False
    temperature: float | None = _within(0, 100)
    top_p: float | None = _within(0, 1, open_low=True)
    presence_penalty: float = _within(-2, 2, default=0.0)
    frequency_penalty: float = _within(-2, 2, default=0.0)
    logit_bias: LogitBias | None = None
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stop: StopStrings = []
    # vLLM
    top_k: int | None = _within(-1, INT32_MAX)
    min_p: float | None = _within(0, 1)
    repetition_penalty: float | None = _within(0, 100, open_low=True)
    min_tokens: NumTokens = 0
    ignore_eos: bool = False
    stop_token_ids: TokenIds = Field([], max_length=256)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = Field(0, ge=-INT32_MAX, le=INT32_MAX)
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_CACHE_SALT_CHARS)
    # Our own
    prefix_cache: bool = True  # false takes nothing from the prefix cache and leaves nothing there
    session_id: SessionId | None = None  # where sessions are off, it says who asks


class GenerationRequest(SamplingRequest):
    """What completions and chat share."""

    n: int = Field(1, ge=1, json_schema_extra={"maximum": MAX_N})
    stream_options: StreamOptions | None = None
    # OpenAI's for chat, vLLM's for completions
    response_format: ResponseFormatInput = None
    # vLLM
    structured_outputs: StructuredInput = None
    return_token_ids: bool = False


class CompletionRequest(GenerationRequest):
    prompt: PromptInput
    max_tokens: NumTokens | None = None  # 16, or what the context has left
    echo: bool = False
    logprobs: int | None = _within(0, MAX_LOGPROBS)
    add_special_tokens: bool = True  # vLLM
    parse_special: bool = False  # llama.cpp: control tokens that the prompt spells are those tokens


class ChatRequest(GenerationRequest):
    messages: MessagesInput
    tools: ToolsInput = None
    tool_choice: ToolChoiceInput = None  # auto where there are tools
    parallel_tool_calls: bool = True
    max_tokens: NumTokens | None = None  # what the context has left
    max_completion_tokens: NumTokens | None = None
    logprobs: bool = False
    top_logprobs: int = _within(0, MAX_LOGPROBS, default=0)
    add_generation_prompt: bool | None = None  # vLLM: true unless continue_final_message
    continue_final_message: bool = False  # vLLM
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] = {}  # vLLM
    stop_in_reasoning: bool = False  # our own: stop strings count in the thought, too


class TokenizeRequest(RequestModel):
    """vLLM's /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: MessagesInput = None
    tools: ToolsInput = None
    add_special_tokens: bool | None = None
    parse_special: bool = False  # llama.cpp
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class DetokenizeRequest(RequestModel):
    tokens: TokenIds
