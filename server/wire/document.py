"""The OpenAPI document of a route. Handlers read bodies and write answers themselves, so FastAPI does not see their
types. Bounds are those of the default settings."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from ..errors import ErrorEnvelope
from .requests import RequestModel
from .schemas import SESSION_ID_SCHEMA

ERRORS = {
    400: "the request is malformed, or a value is out of bounds: `param` names it",
    401: "a key is required",
    403: "without a key, a page of another site or a name that is not local is refused",
    404: "no such model or session",
    408: "the body did not arrive in time",
    409: "the session is not in the cache any more, or its file does not fit this model or is damaged",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "the queue is full",
    431: "the headers are too large",
    500: "the server failed",
    503: "the server is overloaded, draining or without its engine",
    507: "there is no room for the session, in the caches or on the disk",
}
ANY_ROUTE = (401, 403, 413, 431, 500, 503)
WITH_BODY = (400, 408, 415)
GENERATING = (404, 429)
PATH_SCHEMAS = {"session_id": SESSION_ID_SCHEMA}
RETRY_AFTER = {"Retry-After": {"description": "seconds", "required": True, "schema": {"type": "string"}}}


def documented(
    answer: type[msgspec.Struct] | None,
    *errors: int,
    body: type[RequestModel] | None = None,
    path: str | None = None,
    chunk: type[msgspec.Struct] | None = None,
    named_events: Any = None,
) -> dict[str, Any]:
    """The keyword arguments of a route that gives `answer` (None = plain text) or an error.

    `body`: the type of its JSON body. `path`: the name of its path parameter. `chunk`: the type of the data of its
    server-sent events; or `named_events`: a union of structs whose tags are the names of the events.
    """
    errors += ANY_ROUTE + (WITH_BODY if body else ())
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if answer is not None:
        content = {"application/json": {"schema": _schema(answer)}}
    if chunk is not None:
        content["text/event-stream"] = {"schema": _events(chunk)}
    if named_events is not None:
        content["text/event-stream"] = {"schema": _named_events(named_events)}
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": content}}
    responses |= {str(status): _error(status) for status in sorted(errors)}
    extra: dict[str, Any] = {"responses": responses}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _body_schema(body)}}}
    if path is not None:
        schema = PATH_SCHEMAS.get(path, {"type": "string"})
        extra["parameters"] = [{"name": path, "in": "path", "required": True, "schema": schema}]
    return {"response_class": Response, "openapi_extra": extra}


def _events(chunk: type[msgspec.Struct]) -> dict[str, Any]:
    """The schema of an event of a stream."""
    answers = [
        {"type": "string", "contentMediaType": "application/json", "contentSchema": _schema(each)}
        for each in (chunk, ErrorEnvelope)
    ]
    return {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [*answers, {"const": "[DONE]"}]}},
    }


def _named_events(events: Any) -> dict[str, Any]:
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": _schema(events)}
    return {"type": "object", "required": ["event", "data"], "properties": {"event": {"type": "string"}, "data": data}}


def _schema(answer: Any) -> dict[str, Any]:
    return _inline(msgspec.json.schema(answer))


def _error(status: int) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": ERRORS[status],
        "content": {"application/json": {"schema": _schema(ErrorEnvelope)}},
    }
    return described | ({"headers": RETRY_AFTER} if status in (429, 503) else {})


def _body_schema(model: type[RequestModel]) -> dict[str, Any]:
    """The schema of a body: every optional field may be null, and undocumented fields are allowed."""
    schema = _inline(model.model_json_schema())
    _open(schema)
    return schema


def _open(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = True
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        for part in (field, *field.get("anyOf", ())):
            if "properties" in part and part.get("additionalProperties") is False:
                _open(part)
        if name not in required and {"type": "null"} not in field.get("anyOf", ()):
            around = {key: field.pop(key) for key in ("description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]} | around


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """Put the definitions in place of their references: in a route `#/$defs` would point at the whole document."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rsplit("/", 1)[-1]])
        # A discriminator refers to definitions, and says no more than the constants of the alternatives.
        return {key: resolve(entry) for key, entry in node.items() if key != "discriminator"}

    resolved: dict[str, Any] = resolve(schema)
    return resolved
