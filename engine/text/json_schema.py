"""Walk the parts of a JSON schema, and refuse schemas whose grammars explode.

Two things make them explode. The parser keeps several items in mind for every property that may come next. And
llguidance joins all patterns that one text has to match into one, whose states multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

MAX_OPEN_PROPERTIES = 450
MAX_JOINED_PATTERNS = 8
MAX_REFERENCES = 200  # and combinations that lead from one to the next
PATTERN_WIDTH = 8  # a pattern of names is as dear as so many names: all are compared with each other
PATTERNS = ("pattern", "format", "multipleOf")
DATA = frozenset({"const", "enum", "default", "example", "examples"})  # keywords whose values are no schemas
BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})

TOO_WIDE = (
    f"the schema has an object of which more than {MAX_OPEN_PROPERTIES} properties may come next (optional ones in a "
    f"row, alternatives counted together, {PATTERN_WIDTH} for a pattern of names); list some of them as required"
)
TOO_MANY_PATTERNS = (
    f"the schema has a value that must match more than {MAX_JOINED_PATTERNS} patterns or formats at once; join fewer "
    "of them by allOf and $ref"
)


def map_parts(node: dict[str, Any], change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """A copy of a schema in which `change(part, path)` replaces each schema that stands directly in it.

    Paths are below the node: "properties.a", "anyOf[0]". Keywords of no standard may hold schemas that a `$ref` names
    ("components"), so that all objects are parts but those in keywords of data.
    """
    return {key: value if key in DATA else _map_keyword(key, value, change) for key, value in node.items()}


def _map_keyword(key: str, value: Any, change: Callable[[Any, str], Any]) -> Any:
    if isinstance(value, list):
        return [change(part, f"{key}[{i}]") if isinstance(part, dict) else part for i, part in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if key in BY_NAME:
        return {name: change(part, f"{key}.{name}") for name, part in value.items()}
    return change(value, key)


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema within a schema, itself first."""
    rest = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            yield node
            map_parts(node, lambda part, _: rest.append(part))


def check_schema(schema: dict[str, Any]) -> None:
    """Raises `ValueError` that names the bound for what could not be compiled or followed."""
    widths, patterns = _Measure(schema, _own_width, sum), _Measure(schema, _own_patterns, max)
    for node in parts(schema):
        if widths.of(node) > MAX_OPEN_PROPERTIES:
            raise ValueError(TOO_WIDE)
        if patterns.of(node) > MAX_JOINED_PATTERNS:
            raise ValueError(TOO_MANY_PATTERNS)


class _Measure:
    """A number for every part of one schema: the sum of its own number, of the numbers of the parts that it joins, and
    of the joint number of its alternatives."""

    def __init__(
        self,
        root: dict[str, Any],
        own: Callable[[dict[str, Any]], int],
        among: Callable[[list[int]], int],
    ) -> None:
        """own: a node's own number. among: joins the numbers of a node's alternatives into one."""
        self._root = root
        self._own = own
        self._among = among
        self._known: dict[int, int] = {}  # by the part's identity

    def of(self, node: Any, num_followed: int = 0) -> int:
        """The node's number, cut at MAX_OPEN_PROPERTIES + 1."""
        if not isinstance(node, dict):
            return 0
        if id(node) not in self._known:
            if num_followed > MAX_REFERENCES:
                raise ValueError(f"the schema has more than {MAX_REFERENCES} references that lead to each other")
            self._known[id(node)] = 0  # a reference to itself adds nothing
            number = self._own(node)
            number += sum([self.of(part, num_followed + 1) for part in self._joined(node)])
            for key in ("anyOf", "oneOf"):
                number += self._among([0, *[self.of(part, num_followed + 1) for part in as_kind(list, node.get(key))]])
            self._known[id(node)] = min(number, MAX_OPEN_PROPERTIES + 1)
        return self._known[id(node)]

    def _joined(self, node: dict[str, Any]) -> Iterator[Any]:
        yield from as_kind(list, node.get("allOf"))
        if isinstance(node.get("$ref"), str):
            yield target(self._root, node["$ref"])


def target(root: dict[str, Any], reference: str) -> Any:
    """The schema to which a `$ref` leads; None where it leads out of the schema, or nowhere."""
    node: Any = root
    for step in reference.split("/")[1:] if reference.startswith("#") else [""]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list):
            node = node[int(key)] if key.isdecimal() and int(key) < len(node) else None
        else:
            node = node.get(key) if isinstance(node, dict) else None
    return node


def _own_width(node: dict[str, Any]) -> int:
    """The longest row of optional properties, for they come in their order; and one for the object itself."""
    required = {name for name in as_kind(list, node.get("required")) if isinstance(name, str)}
    longest = row = 0
    properties = as_kind(dict, node.get("properties"))
    for name in properties:
        row = 0 if name in required else row + 1
        longest = max(longest, row)
    return longest + PATTERN_WIDTH * len(as_kind(dict, node.get("patternProperties"))) + bool(properties)


def _own_patterns(node: dict[str, Any]) -> int:
    return sum(key in node for key in PATTERNS)


def as_kind(kind: type, value: Any) -> Any:
    """The value, or an empty `kind` if the value has another type."""
    return value if isinstance(value, kind) else kind()
