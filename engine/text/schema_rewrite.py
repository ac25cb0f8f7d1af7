"""Rewrites a JSON schema into one with the same meaning that llguidance supports, in any version from 1.0.

- A schema that allows nothing ("not": {}) becomes false. Keywords without effect ("uniqueItems": false) are left out.
- Titles and descriptions are left out: they make the grammars of many tools too large.
- Property names that are bound to a list or a pattern (`propertyNames`, in every zod record) become properties or a
  pattern.
- `oneOf` becomes `anyOf` if no value fits two of its alternatives. llguidance itself does not look through `$ref`.
- A pattern of names applies to listed properties too, which llguidance ignores before 1.9. If a pattern matches listed
  names only, it is left out: llguidance would allow a comma after which no name is left.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations
from typing import Any

from .json_schema import as_kind, map_parts, parts, target

MAX_COMPARED = 20_000  # pairs of alternatives of `oneOf`, and of names and patterns, in one schema
MAX_NAMES_CHARS = 65_536  # JSON characters of the properties that replace one `propertyNames`
MAX_FOLLOWED = 8  # references, and levels of nested objects, followed to compare two alternatives
KINDS = frozenset({"null", "boolean", "number", "string", "array", "object"})
KIND_OF = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
NAMES_LIMIT = frozenset({"type", "pattern", "enum", "const"})
TEXTS = frozenset({"title", "description", "$comment"})
ANNOTATIONS = TEXTS | {"$schema", "$id", "id", "default", "example", "examples", "deprecated", "readOnly", "writeOnly"}
MATCHES_ALL = frozenset({"", "^", "$", ".*", "^.*"})


def rewrite(schema: dict[str, Any]) -> dict[str, Any]:
    """The rewritten schema. Does not change `schema`, but may share its parts. Raises `ValueError` if it allows no
    value."""
    rewritten = _Rewriting(schema).of(schema)
    if rewritten is False:
        raise ValueError("the schema allows no value at all")
    return dict(rewritten)


class _Rewriting:
    """The rewriting of one schema."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._names = sorted(_names_in(root))
        self._num_compared = 0

    def of(self, node: Any, _: str = "") -> Any:
        if not isinstance(node, dict):
            return node
        node = map_parts(node, self.of)
        node = {key: value for key, value in node.items() if key not in TEXTS or not isinstance(value, str)}
        if "not" in node and self._is_empty(node["not"]):
            return False
        if node.get("not") is False:
            del node["not"]
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        if "propertyNames" in node:
            node = self._without_property_names(node)
        if "oneOf" in node and self._have_nothing_common(node["oneOf"]):
            node = coerce_one_of(node)
        if isinstance(node.get("patternProperties"), dict):
            node = self._with_patterns_joined(node)
        return node

    @staticmethod
    def _is_empty(node: Any) -> bool:
        """Whether the schema has no constraint, and so allows every value."""
        return node is True or (isinstance(node, dict) and node.keys() <= ANNOTATIONS)

    def _without_property_names(self, node: dict[str, Any]) -> dict[str, Any]:
        """Replace `propertyNames` by properties or a pattern. Returns the node unchanged if neither can replace it."""
        names = self._resolved(node["propertyNames"])
        if self._is_empty(names) or (isinstance(names, dict) and names.keys() - ANNOTATIONS == {"type"}):
            says_nothing = self._is_empty(names) or "string" in _listed(names["type"])
            return _without(node, "propertyNames") if says_nothing else node
        if not isinstance(names, dict) or not names.keys() - ANNOTATIONS <= NAMES_LIMIT or "patternProperties" in node:
            return node
        value = node.get("additionalProperties", True)
        closed = _without(node, "propertyNames") | {"additionalProperties": False}
        allowed = _values(names)
        if allowed is None:
            is_pattern = isinstance(names.get("pattern"), str) and not node.get("properties")
            return closed | {"patternProperties": {names["pattern"]: value}} if is_pattern else node
        listed = as_kind(dict, node.get("properties"))
        properties = {name: listed.get(name, value) for name in allowed if isinstance(name, str)}
        is_short = len(properties) * len(json.dumps(value)) <= MAX_NAMES_CHARS
        return closed | {"properties": properties} if is_short and "pattern" not in names else node

    def _with_patterns_joined(self, node: dict[str, Any]) -> dict[str, Any]:
        patterns, listed = node["patternProperties"], as_kind(dict, node.get("properties"))
        if len(patterns) == 1 and patterns.keys() <= MATCHES_ALL:
            (everything,) = patterns.values()
            properties = {name: _both(part, everything) for name, part in listed.items()}
            return _without(node, "patternProperties") | {"properties": properties, "additionalProperties": everything}
        self._num_compared += len(patterns) * len(self._names)
        if self._num_compared > MAX_COMPARED:
            raise ValueError(
                f"the schema has more than {MAX_COMPARED} pairs of a name and a pattern of names; use fewer patterns"
            )
        matched = {pattern: _matching(pattern, self._names) for pattern in patterns}
        lists = {pattern for pattern, names in matched.items() if names and not _takes_others(pattern, names)}
        known = {*listed, *_required(node), *(name for each in lists for name in matched[each])}
        properties = dict(listed)
        for pattern, part in patterns.items():
            for name in matched[pattern]:
                if name in known:
                    properties[name] = _both(properties.get(name, True), part)
        kept = {pattern: part for pattern, part in patterns.items() if pattern not in lists}
        joined = {"properties": properties, "patternProperties": kept}
        return _without(node, "patternProperties") | {key: value for key, value in joined.items() if value}

    def _have_nothing_common(self, alternatives: Any) -> bool:
        """Whether surely no value fits two of the alternatives."""
        return isinstance(alternatives, list) and all(
            self._are_apart(first, second) for first, second in combinations(alternatives, 2)
        )

    def _are_apart(self, first: Any, second: Any, depth: int = 0) -> bool:
        first, second = self._resolved(first), self._resolved(second)
        if first is False or second is False:
            return True
        is_known = isinstance(first, dict) and isinstance(second, dict)
        if not is_known or depth > MAX_FOLLOWED or self._num_compared > MAX_COMPARED:
            return False
        values = [_values(node) for node in (first, second)]
        self._num_compared += 1 + sum(len(each or ()) for each in values)
        for one, other in ((first, second), (second, first)):
            for key in ("anyOf", "oneOf"):
                alternatives = as_kind(list, one.get(key))
                if alternatives and all(self._are_apart(part, other, depth + 1) for part in alternatives):
                    return True
        shared = _kinds(first) & _kinds(second)
        if not shared or (None not in values and set.isdisjoint(*map(_as_keys, values))):
            return True
        return shared == {"object"} and self._have_property_apart(first, second, depth)

    def _have_property_apart(self, first: dict[str, Any], second: dict[str, Any], depth: int) -> bool:
        """Whether the values of some required property can tell two objects apart."""
        needed = dict.fromkeys([*_required(first), *_required(second)])
        return any(self._are_apart(_property(first, name), _property(second, name), depth + 1) for name in needed)

    def _resolved(self, node: Any) -> Any:
        """Follow references. A node with other constraints beside its reference is returned as it is."""
        for _ in range(MAX_FOLLOWED):
            is_reference = isinstance(node, dict) and node.keys() - ANNOTATIONS == {"$ref"}
            if not is_reference or not isinstance(node["$ref"], str):
                break
            node = target(self._root, node["$ref"])
        return node


def _names_in(schema: dict[str, Any]) -> set[str]:
    """All property names that the schema lists or requires."""
    found: set[str] = set()
    for node in parts(schema):
        found.update(as_kind(dict, node.get("properties")))
        found.update(_required(node))
    return found


def _required(node: dict[str, Any]) -> list[str]:
    return [name for name in as_kind(list, node.get("required")) if isinstance(name, str)]


def _property(node: dict[str, Any], name: str) -> Any:
    """The schema of an object's property. True (any value) if the property is not listed and patterns of names may
    apply to it."""
    if name in as_kind(dict, node.get("properties")):
        return node["properties"][name]
    return True if node.get("patternProperties") else node.get("additionalProperties", True)


def _kinds(node: dict[str, Any]) -> set[str]:
    """The JSON types of the values that a schema allows. An integer counts as a number."""
    values = _values(node)
    if values is not None:
        return {KIND_OF.get(type(value), "object") for value in values}
    kinds = {"number" if kind == "integer" else kind for kind in _listed(node.get("type")) if isinstance(kind, str)}
    return kinds or set(KINDS)


def _values(node: dict[str, Any]) -> list[Any] | None:
    """The values that a schema lists by `const` or `enum`, or None."""
    if "const" in node:
        return [node["const"]]
    return node["enum"] if isinstance(node.get("enum"), list) else None


def _as_keys(values: Any) -> set[Any]:
    """Hashable keys of JSON values, equal if the values are equal in JSON: 1 equals 1.0 and not true."""
    return {
        json.dumps(value, sort_keys=True) if isinstance(value, bool | list | dict) else (value,) for value in values
    }


def coerce_one_of(node: dict[str, Any]) -> dict[str, Any]:
    """The node with `anyOf` in place of its `oneOf`. An `anyOf` that it has already stays valid."""
    alternatives = {"anyOf": node["oneOf"]}
    if "anyOf" in node:
        alternatives = {"allOf": [*as_kind(list, node.get("allOf")), alternatives]}
    return _without(node, "oneOf") | alternatives


def _both(first: Any, second: Any) -> Any:
    if first is False or second is False:
        return False
    if first in (True, {}) or second in (True, {}):
        return second if first in (True, {}) else first
    return {"allOf": [first, second]}


def _without(node: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name != key}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matching(pattern: str, names: list[str]) -> list[str]:
    """The names that a pattern matches. llguidance matches them, because it bounds the time and has its own syntax."""
    matcher = _matcher({"type": "string", "pattern": pattern})
    return [name for name in names if _takes(matcher, json.dumps(name, ensure_ascii=False))]


def _takes_others(pattern: str, names: list[str]) -> bool:
    """Whether the pattern matches any name outside `names`, as far as llguidance can tell."""
    taken = {"properties": dict.fromkeys(names, False), "patternProperties": {pattern: True}}
    return _takes(_matcher({"type": "object", "additionalProperties": False} | taken), '{"')


def _matcher(schema: dict[str, Any]) -> Any:
    from llguidance import LLMatcher

    return LLMatcher(byte_vocabulary(), LLMatcher.grammar_from_json_schema(schema), log_level=0)


def _takes(matcher: Any, text: str) -> bool:
    tokens = byte_vocabulary().tokenize_bytes(text.encode())
    return bool(matcher.deep_copy().try_consume_tokens(tokens) == len(tokens))


@cache
def byte_vocabulary() -> Any:
    """An llguidance tokenizer of the 256 bytes, to test whether a schema allows a text."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
