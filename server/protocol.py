"""The requests, as strict pydantic types. Bounds that depend on settings or on the model are checked in `validation`.

Responses are in `responses`. Names and meanings are OpenAI's; those marked vLLM are its extensions.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema

from ..engine.sampling_params import MAX_LOGIT_BIAS
from .tools import MAX_TOOLS, NAME

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def _bound_entries(value: Any) -> Any:
    """Before each entry is looked at."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must have at most {MAX_LOGIT_BIAS} entries, has {len(value)}")
    return value


NumTokens = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], FailFast()]
StopStrings = Annotated[
    list[str],
    FailFast(),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
LogitBias = Annotated[dict[str, float], BeforeValidator(_bound_entries)]
PromptInput = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
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
                        "properties": {
                            "name": {"type": "string", "pattern": f"^{NAME.pattern}$"},
                            "description": {"type": "string"},
                            "parameters": {"type": "object"},
                            "strict": {"type": "boolean"},
                        },
                    },
                },
            },
        }
    ),
]
ToolChoiceInput = Annotated[
    Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]})
]


class RequestModel(BaseModel):
    """A body without nulls and without unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM: usage on every chunk


class GenerationRequest(RequestModel):
    """What both generation routes share."""

    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: LogitBias | None = None
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stop: StopStrings = []
    # vLLM
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: NumTokens = 0
    ignore_eos: bool = False
    stop_token_ids: TokenIds = Field([], max_length=256)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = Field(0, ge=-INT32_MAX, le=INT32_MAX)
    return_token_ids: bool = False


class CompletionRequest(GenerationRequest):
    prompt: PromptInput
    max_tokens: NumTokens | None = None  # 16, or what the context has left
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True  # vLLM


class ChatRequest(GenerationRequest):
    messages: MessagesInput
    tools: ToolsInput = None
    tool_choice: ToolChoiceInput = None  # auto where there are tools
    parallel_tool_calls: bool = True
    max_tokens: NumTokens | None = None  # what the context has left
    max_completion_tokens: NumTokens | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    add_generation_prompt: bool | None = None  # vLLM: true unless continue_final_message
    continue_final_message: bool = False  # vLLM


class TokenizeRequest(RequestModel):
    """vLLM's /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: MessagesInput = None
    tools: ToolsInput = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(RequestModel):
    tokens: TokenIds
