"""The part of a JSON schema that llguidance can hold an answer to, and the paths of the keywords that it cannot.

llguidance is asked, keyword by keyword, since every version of it takes more. A node is tried without the nodes below
it and without `$ref`, so that a keyword is never blamed for what stands elsewhere.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NamedTuple

from .grammar import json_rule, make_matcher
from .json_schema import BY_NAME, check_schema, map_parts
from .schema_rewrite import ANNOTATIONS, byte_vocabulary, coerce_one_of, rewrite

MAX_TRIED = 250  # different keywords of one schema, for about 1 ms each; further ones are left out
MAX_KEPT = 128  # subsets of schemas that are sent again and again
# Keywords that every version supports. A schema in which one of these cannot be used is wrong, or too large.
CORE = frozenset({"$ref", "$anchor", "$defs", "definitions", "anyOf", "allOf", "const", "enum", "type", "items"})
CORE |= {"prefixItems", "additionalItems", "minItems", "maxItems", "properties", "additionalProperties", "required"}
CORE |= {"minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
KNOWN = CORE | ANNOTATIONS - {"$schema", "$id"}  # what these two name may be unknown
HOLDERS = frozenset(
    {"not", "if", "then", "else", "contains", "propertyNames", "items", "prefixItems", "anyOf", "allOf"}
)
HOLDERS |= {"additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"}


class Subset(NamedTuple):
    """`left_out`: where the keywords stand that `schema` does not have, like "properties.a.uniqueItems"."""

    schema: dict[str, Any]
    left_out: tuple[str, ...]


def supported_subset(schema: dict[str, Any]) -> Subset:
    """The part of a schema that llguidance supports, rewritten. Takes 1 ms for each keyword that has to be tried.

    Raises `ValueError`, which names the fault of the schema or the bound that it exceeds.
    """
    try:
        return _subset_of(json.dumps(schema))
    except RecursionError:
        raise ValueError("the schema nests too deeply") from None


@lru_cache(MAX_KEPT)
def _subset_of(text: str) -> Subset:
    schema = json.loads(text)
    check_schema(schema)
    schema = rewrite(schema)
    if _compiles(schema):
        return Subset(schema, ())
    keeping = _Keeping()
    kept = keeping.of(schema)
    if not _compiles(kept):  # keywords of several nodes exclude each other, or something else is wrong
        keeping = _Keeping(only_core=True)
        kept = keeping.of(schema)
        _compile(kept)
    return Subset(kept, tuple(keeping.left_out))


class _Keeping:
    """The search for the supported keywords of one schema."""

    def __init__(self, *, only_core: bool = False) -> None:
        self._only_core = only_core
        self.left_out: list[str] = []
        self._tried: dict[str, bool] = {}

    def of(self, node: Any, path: str = "") -> Any:
        if not isinstance(node, dict):
            return node
        node = map_parts(node, lambda part, below: self.of(part, _below(path, below)))
        if "oneOf" in node:
            self.left_out.append(_below(path, "oneOf"))
            node = coerce_one_of(node)
        tried = {key: _shallow(key, value) for key, value in node.items() if key in CORE and key != "$ref"}
        for key in [key for key in node if key not in KNOWN]:
            asked = tried | {key: _shallow(key, node[key])}
            if not self._only_core and self._compiles(asked):
                tried = asked
            else:
                self.left_out.append(_below(path, key))
                del node[key]
        return node

    def _compiles(self, node: dict[str, Any]) -> bool:
        text = json.dumps(node)
        if text not in self._tried and len(self._tried) < MAX_TRIED:
            self._tried[text] = _compiles(node)
        return self._tried.get(text, False)


def _compiles(schema: dict[str, Any]) -> bool:
    try:
        _compile(schema)
    except ValueError:
        return False
    return True


def _compile(schema: dict[str, Any]) -> None:
    make_matcher(f"start: {json_rule(schema)}\n", byte_vocabulary())


def _shallow(key: str, value: Any) -> Any:
    """The value of a keyword without the schemas in it; false stays, which says something about the node itself."""
    if key not in HOLDERS | BY_NAME:
        return value
    if isinstance(value, list):
        return [part is not False for part in value]
    if not isinstance(value, dict):
        return value
    return {name: part is not False for name, part in value.items()} if key in BY_NAME else True


def _below(path: str, below: str) -> str:
    return f"{path}.{below}" if path else below
