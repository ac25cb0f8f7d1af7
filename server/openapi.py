"""The OpenAPI document's request bodies. Handlers read bodies themselves, so FastAPI cannot see their types."""

from __future__ import annotations

from typing import Any

from .protocol import RequestModel


def json_body(model: type[RequestModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes `model` as JSON."""
    schema = _inline(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """Put the definitions where they are used: inside a route, `#/$defs` would point at the whole document."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rsplit("/", 1)[-1]])
        return {key: resolve(entry) for key, entry in node.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved
