"""The arguments of `xml_calls` as rules of a grammar: one parameter after another, each value by its own schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...engine.text.grammar import json_rule
from ...engine.text.json_schema import as_kind, map_parts, target
from .argument_types import types_of
from .arguments import Arguments
from .xml_calls import END_PARAMETER, MAX_KEY, PARAMETER

KEY_END = ">\n"
END = f"\n{END_PARAMETER}\n"
# What `xml_calls` would take for the end of a value is in no text.
TEXT_RULES = (
    f"parameter_text[suffix={json.dumps(END)}]: PARAMETER_TEXT",
    r"PARAMETER_TEXT: /(.|\n)*/ & ~/(.|\n)*(<parameter=|<\/parameter>|<\/function>)(.|\n)*/",
)
OTHER_KEY = "/[^<>\\s][^<>\\n]{0,63}/"
OF_TEXT = ("pattern", "format", "minLength", "maxLength", "allOf")
OF_OBJECT = ("patternProperties", "minProperties", "maxProperties", "dependentSchemas", "anyOf", "oneOf")
MAX_NESTED = 8  # alternatives within alternatives


def xml_arguments(name: str, schema: dict[str, Any]) -> Arguments:
    """The rule `name`: the parameters of a schema in its order, those that it does not require at will. Where it lists
    some, there are no others.

    Keywords on the length and form of a text, and those that bind several parameters together, are left out.
    """
    return _Writer(name, schema).write()


class _Writer:
    def __init__(self, name: str, schema: dict[str, Any]) -> None:
        self._name, self._schema = name, schema
        self._rules: list[str] = []
        self._left_out: list[str] = [key for key in OF_OBJECT if key in schema]

    def write(self) -> Arguments:
        properties: dict[str, Any] = {}
        required: set[Any] = set()
        for node, is_certain in _objects(self._schema, self._schema):
            properties |= as_kind(dict, node.get("properties"))
            required |= set(as_kind(list, node.get("required"))) if is_certain else set()
        pieces = []
        for key, part in properties.items():
            if part is False:
                continue
            if not _can_be_written(key):
                self._left_out.append(f"properties.{key}")
                continue
            piece = f"{_quoted(PARAMETER + key + KEY_END)} ({self._value(part, f'properties.{key}')})"
            pieces.append(piece if key in required else f"({piece})?")
        others = self._schema.get("additionalProperties", not properties and "properties" not in self._schema)
        if properties and others is not False:
            self._left_out.append("additionalProperties")  # such a name might be that of a property, given twice
        elif others is not False:
            value = self._value(others, "additionalProperties")
            pieces.append(f"({_quoted(PARAMETER)} {OTHER_KEY} {_quoted(KEY_END)} ({value}))*")
        rule = f"{self._name}: {' '.join(pieces) or _quoted('')}"
        return Arguments([rule, *self._rules, *TEXT_RULES], tuple(self._left_out))

    def _value(self, part: Any, path: str, num_nested: int = 0) -> str:
        """A value and its end."""
        node = as_kind(dict, part)
        listed = as_kind(list, node.get("enum")) or ([node["const"]] if "const" in node else [])
        if listed:
            return f"({' | '.join(_quoted(_spelt(value)) for value in listed)}) {_quoted(END)}"
        if "string" not in types_of(node, self._schema):
            return f"{self._json_rule(node)} {_quoted(END)}"
        alternatives = _alternatives(node)
        if alternatives and num_nested < MAX_NESTED:
            return " | ".join(f"({self._value(other, path, num_nested + 1)})" for other in alternatives)
        if isinstance(node.get("$ref"), str) and num_nested < MAX_NESTED:
            return self._value(target(self._schema, node["$ref"]), path, num_nested + 1)
        self._left_out += [f"{path}.{key}" for key in OF_TEXT if key in node]
        return "parameter_text"

    def _json_rule(self, node: dict[str, Any]) -> str:
        name = f"{self._name}_{len(self._rules)}"
        self._rules.append(f"{name}: {json_rule(_with_root(node, self._schema))}")
        return name


def _objects(
    node: Any, root: dict[str, Any], is_certain: bool = True, num_nested: int = 0
) -> Iterator[tuple[Any, bool]]:
    """The schemas that an object follows, and whether it always does."""
    if not isinstance(node, dict) or num_nested > MAX_NESTED:
        return
    yield node, is_certain
    if isinstance(node.get("$ref"), str):
        yield from _objects(target(root, node["$ref"]), root, is_certain, num_nested + 1)
    for key in ("allOf", "anyOf", "oneOf"):
        for part in as_kind(list, node.get(key)):
            yield from _objects(part, root, is_certain and key == "allOf", num_nested + 1)


def _alternatives(node: dict[str, Any]) -> list[Any]:
    joined = as_kind(list, node.get("allOf"))
    return as_kind(list, node.get("anyOf")) or as_kind(list, node.get("oneOf")) or joined * (len(joined) == 1)


def _can_be_written(key: str) -> bool:
    """Whether `xml_calls` reads the name of a parameter as it is."""
    return 0 < len(key) < MAX_KEY and key == key.strip() and not set(key) & set("<>\n")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _spelt(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_root(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """A part of `root` as a schema of its own, which holds `root` for its `$ref`s."""
    return _moved(node) | {"$defs": {"whole": _moved(root)}} if "$ref" in json.dumps(node) else node


def _moved(node: Any, _: str = "") -> Any:
    """A schema whose references lead below `#/$defs/whole`."""
    if not isinstance(node, dict):
        return node
    reference = node.get("$ref")
    moved = {"$ref": f"#/$defs/whole{reference[1:]}"} if isinstance(reference, str) else {}
    return map_parts(node, _moved) | moved
