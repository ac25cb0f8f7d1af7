"""The types that a JSON schema gives an argument, and the argument's text as JSON of one of them."""

from __future__ import annotations

import json
from typing import Any

from ...engine.text.json_schema import as_kind, target

STRING = frozenset({"string"})
NULLS = ("null", "None")  # templates that print values by `str` have taught models Python's word
TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
# Of schemas without `type`.
TELLING = {"properties": "object", "additionalProperties": "object", "items": "array", "prefixItems": "array"}


def types_of(schema: Any, root: dict[str, Any]) -> frozenset[str]:
    """The types of a schema's values; "string" where it names none. `root`: the schema at which `$ref`s start."""
    found: set[str] = set()
    seen: set[int] = set()
    rest = [schema]
    while rest:
        node = rest.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        named = _own_types(node)
        found |= named
        if not named:
            rest += [part for key in ("anyOf", "oneOf", "allOf") for part in as_kind(list, node.get(key))]
            rest.append(target(root, node["$ref"]) if isinstance(node.get("$ref"), str) else None)
    return frozenset(found) or STRING


def as_json(text: str, types: frozenset[str]) -> str:
    """`text` as JSON of one of `types`, as written where it is that; else the JSON string of `text`. A word for null is
    null, unless the types are `STRING` alone."""
    word = text.strip()
    if types == STRING:
        return json.dumps(text, ensure_ascii=False)
    if word in NULLS:
        return "null"
    if "boolean" in types and word in ("True", "False"):
        return word.lower()
    value = _parsed(word, strict=True)
    if _type_name(value) in types:
        return word
    if "number" in types and isinstance(value, int) and not isinstance(value, bool):
        return word
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return str(int(value))
    if types & {"object", "array"} and _type_name(value := _parsed(word, strict=False)) in types:
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)


def _own_types(node: dict[str, Any]) -> set[str]:
    given = node.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {name for name in given if isinstance(name, str)}
    values = as_kind(list, node.get("enum")) + ([node["const"]] if "const" in node else [])
    if values:
        return {_type_name(value) for value in values}
    return {name for key, name in TELLING.items() if key in node}


def _type_name(value: object) -> str:
    return TYPE_NAMES.get(type(value), "object")


def _parsed(text: str, *, strict: bool) -> object:
    """The value of a JSON text, with raw line breaks in strings unless `strict`; a text that is no JSON is its own."""
    try:
        return json.loads(text, strict=strict, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
