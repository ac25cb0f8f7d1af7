"""Types of single fields of requests, with the JSON schema that the OpenAPI document shows for each.

Fields whose errors need more than a type have the type `Any` here, and are read in `door`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, WithJsonSchema

from ...configs.schema import ServerConfig
from ...engine.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_CHARS, MAX_STOP_STRINGS
from ...engine.sessions.folder import SESSION_ID, SESSION_ID_FORM

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_CACHE_SALT_CHARS = 256
MAX_TOOLS = 128  # OpenAI's
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ROLES = ("system", "developer", "user", "assistant", "tool")
# Bounds in the document: the defaults of settings that `validation` checks.
MAX_N = ServerConfig.model_fields["max_n"].default
MAX_PROMPTS = ServerConfig.model_fields["max_prompts"].default

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _bound_entries(value: Any) -> Any:
    """Refuse too many entries before each of them is checked."""
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
                    "role": {"enum": list(ROLES)},
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
    "name": {"type": "string", "pattern": f"^{FUNCTION_NAME.pattern}$"},
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
