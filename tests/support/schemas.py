"""JSON schemas as applications send them, each with the paths of the keywords that llguidance 1.9 cannot hold."""

from __future__ import annotations

from typing import Any

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
DRAFT_2020 = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
ZOD_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"


def record(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object of which every property is required."""
    return {"type": "object", "properties": properties, "required": [*properties], **more}


CAT = record({"kind": {"const": "cat", "default": "cat", "type": "string"}, "lives": INTEGER}, title="Cat")
DOG = record({"kind": {"const": "dog", "type": "string"}, "name": STRING}, title="Dog")
REFERENCES = [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]
DISCRIMINATOR = {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}}
OPTIONAL = {"anyOf": [{"type": "string", "maxLength": 9}, {"type": "null"}], "default": None, "title": "Nickname"}

SCHEMAS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing said": ({}, []),
    "any object": ({"type": "object"}, []),
    "zod 4 record": (
        DRAFT_2020 | {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": INTEGER},
        [],
    ),
    "zod 4 record of an enum": (
        {"type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]}, "additionalProperties": INTEGER}
        | {"required": ["a", "b"]},
        [],
    ),
    "zod 4 record of a pattern": (
        {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}, "additionalProperties": STRING},
        [],
    ),
    "zod 4 record of long names": (
        {"type": "object", "propertyNames": {"type": "string", "minLength": 2}, "additionalProperties": INTEGER},
        ["propertyNames"],
    ),
    "zod 4 email": (
        record({"e": {"type": "string", "format": "email", "pattern": ZOD_EMAIL}}),
        ["properties.e.pattern"],
    ),
    "zod 4 set": (
        record({"s": {"type": "array", "items": INTEGER, "uniqueItems": True}}),
        ["properties.s.uniqueItems"],
    ),
    "zod never": (record({"a": INTEGER}, additionalProperties={"not": {}}), []),
    "zod optional": (DRAFT_7 | record({"a": {"anyOf": [{"not": {}}, STRING]}}, additionalProperties=False), []),
    "zod 4 integer": (record({"i": INTEGER | {"minimum": -(2**53) + 1, "maximum": 2**53 - 1}}), []),
    "zod nullable union": (record({"a": {"type": ["string", "null"], "enum": ["x", "y", None]}}), []),
    "pydantic discriminated union": (
        record({"pet": {"discriminator": DISCRIMINATOR, "oneOf": REFERENCES}}, **{"$defs": {"Cat": CAT, "Dog": DOG}}),
        [],
    ),
    "pydantic union in a list": (
        record({"pets": {"type": "array", "items": {"anyOf": REFERENCES}}}, **{"$defs": {"Cat": CAT, "Dog": DOG}}),
        [],
    ),
    "pydantic recursion": (
        {
            "$defs": {
                "Node": {
                    "properties": {
                        "value": INTEGER | {"title": "Value"},
                        "children": {"items": {"$ref": "#/$defs/Node"}, "type": "array", "maxItems": 2, "default": []},
                    },
                    "required": ["value"],
                    "type": "object",
                }
            },
            "$ref": "#/$defs/Node",
        },
        [],
    ),
    "pydantic optional": ({"type": "object", "properties": {"nickname": OPTIONAL}}, []),
    "pydantic literal": (record({"a": {"enum": ["x", 1, True], "title": "A"}, "b": {"const": "y"}}), []),
    "pydantic dates": (
        record({f: {"type": "string", "format": f} for f in ("date-time", "date", "time", "duration", "uuid")}),
        [],
    ),
    "pydantic bytes and secrets": (
        record({f: {"type": "string", "format": f, "writeOnly": True} for f in ("binary", "password", "file-path")}),
        [f"properties.{f}.format" for f in ("binary", "password", "file-path")],
    ),
    "pydantic constr": (record({"c": {"type": "string", "pattern": r"^[A-Z]{2}-\d{2,4}$"}}), []),
    "pydantic look-ahead": (
        record({"c": {"type": "string", "pattern": r"^(?=.*\d)[a-z\d]{4,8}$", "maxLength": 8}}),
        ["properties.c.pattern"],
    ),
    "pydantic decimal": (
        record({"d": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^-?\d+(\.\d+)?$"}]}}),
        [],
    ),
    "pydantic tuple": (
        record({"t": {"type": "array", "prefixItems": [INTEGER, STRING], "minItems": 2, "maxItems": 2}}),
        [],
    ),
    "pydantic numbers": (
        record({"n": {"type": "number", "exclusiveMinimum": 0, "maximum": 9}, "m": INTEGER | {"multipleOf": 5}}),
        [],
    ),
    "openai strict": (
        record({"a": {"type": ["string", "null"]}, "b": {"$ref": "#/$defs/S"}}, additionalProperties=False)
        | {"$defs": {"S": {"enum": ["on", "off"], "title": "S", "type": "string"}}},
        [],
    ),
    "langchain tool": (
        {"title": "search", "description": "Find pages.", "type": "object", "required": ["query"]}
        | {"properties": {"query": {"description": "What", "type": "string"}, "k": INTEGER | {"default": 4}}},
        [],
    ),
    "mcp fetch": (
        DRAFT_7
        | record({"url": {"type": "string", "format": "uri", "minLength": 1}}, additionalProperties=False)
        | {"description": "Parameters for fetching a URL."},
        [],
    ),
    "mcp open arguments": ({"type": "object", "properties": {"args": {"additionalProperties": True}}}, []),
    "mcp url": (record({"url": {"type": "string", "format": "url"}}), ["properties.url.format"]),
    "openapi numbers": (record({"i": INTEGER | {"format": "int64"}, "d": {"type": "number", "format": "double"}}), []),
    "conditions": (
        record(
            {"a": {"type": "boolean"}}, **{"if": {"properties": {"a": {"const": True}}}, "then": {"required": ["b"]}}
        ),
        ["if", "then"],
    ),
    "overlapping oneOf": (record({"a": {"oneOf": [STRING, {"minLength": 2}]}}), ["properties.a.oneOf"]),
    "oneOf of kinds": ({"oneOf": [{"type": "object", "maxProperties": 1}, {"type": "array"}, {"enum": [1, True]}]}, []),
    "contains and not": (
        {"type": "array", "items": STRING, "contains": {"const": "a"}, "not": {"maxItems": 1}},
        ["contains", "not"],
    ),
    "counted properties": (
        {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "required": ["a"], "maxProperties": 2},
        ["maxProperties"],
    ),
    "unknown dialect": ({"$schema": "https://example.com/dialect"} | record({"a": INTEGER}), ["$schema"]),
    "a pattern of one listed name": (
        record({"ab": {}}, patternProperties={"^ab$": INTEGER}, additionalProperties=False),
        [],
    ),
    "a pattern of listed names elsewhere": (
        {"type": "object", "patternProperties": {"^(ab|b)$": {"maxLength": 2}}, "allOf": [{"required": ["ab"]}]}
        | {"properties": {"b": STRING}, "additionalProperties": False},
        [],
    ),
    "a pattern of more names": (
        record({"ab": {}, "c": STRING}, patternProperties={"^a": {"minimum": 5, "type": "integer"}}),
        [],
    ),
    "a pattern of all names": ({"type": "object", "patternProperties": {".*": INTEGER}, "properties": {"a": {}}}, []),
    "patterns that overlap": (
        {"type": "object", "patternProperties": {"^a": INTEGER, "b$": INTEGER}, "additionalProperties": False},
        ["patternProperties"],
    ),
    "a property called like a keyword": (
        record({"not": INTEGER, "default": {"type": "array", "uniqueItems": True, "maxItems": 2}, "oneOf": STRING}),
        ["properties.default.uniqueItems"],
    ),
}
