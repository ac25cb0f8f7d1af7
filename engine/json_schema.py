"""What of a JSON schema makes a grammar explode: much that may come at one place, and many patterns for one text.

The parser keeps several things in mind for every property that may come next, and llguidance joins the patterns that
one text has to match into one, whose states multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

MAX_OPEN_PROPERTIES = 450
MAX_JOINED_PATTERNS = 8
MAX_REFERENCES = 200  # and combinations that lead from one to the next
PATTERN_WIDTH = 8  # a pattern of names is as dear as so many names: all are compared with each other
PATTERNS = ("pattern", "format", "multipleOf")
DATA = frozenset({"const", "enum", "default", "examples"})  # keywords whose values are no schemas

TOO_WIDE = (
    f"the schema has an object of which more than {MAX_OPEN_PROPERTIES} properties may come next (optional ones in a "
    f"row, those of alternatives together, {PATTERN_WIDTH} for a pattern of names); list some of them as required"
)
TOO_MANY_PATTERNS = (
    f"the schema has a value that must match more than {MAX_JOINED_PATTERNS} patterns or formats at once; join fewer "
    "of them by allOf and $ref"
)


def check_schema(schema: dict[str, Any]) -> None:
    """Raises `ValueError` that names the bound for what could not be compiled or followed."""
    widths, patterns = _Measure(schema, _own_width, sum), _Measure(schema, _own_patterns, max)
    rest: list[Any] = [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            if widths.of(node) > MAX_OPEN_PROPERTIES:
                raise ValueError(TOO_WIDE)
            if patterns.of(node) > MAX_JOINED_PATTERNS:
                raise ValueError(TOO_MANY_PATTERNS)
            rest += [value for key, value in node.items() if key not in DATA]
        elif isinstance(node, list):
            rest += node


class _Measure:
    """A number of every part of one schema: its own, those of the parts that it joins, and of its alternatives."""

    def __init__(
        self,
        root: dict[str, Any],
        own: Callable[[dict[str, Any]], int],
        among: Callable[[list[int]], int],
    ) -> None:
        """`among`: the numbers of alternatives -> that of having them."""
        self._root = root
        self._own = own
        self._among = among
        self._known: dict[int, int] = {}  # by the part's identity

    def of(self, node: Any, num_followed: int = 0) -> int:
        """At most one more than matters."""
        if not isinstance(node, dict):
            return 0
        if id(node) not in self._known:
            if num_followed > MAX_REFERENCES:
                raise ValueError(f"the schema has more than {MAX_REFERENCES} references that lead to each other")
            self._known[id(node)] = 0  # a reference to itself adds nothing
            number = self._own(node)
            number += sum([self.of(part, num_followed + 1) for part in self._joined(node)])
            for key in ("anyOf", "oneOf"):
                number += self._among([0, *[self.of(part, num_followed + 1) for part in _as(list, node.get(key))]])
            self._known[id(node)] = min(number, MAX_OPEN_PROPERTIES + 1)
        return self._known[id(node)]

    def _joined(self, node: dict[str, Any]) -> Iterator[Any]:
        yield from _as(list, node.get("allOf"))
        if isinstance(node.get("$ref"), str):
            yield self._target(node["$ref"])

    def _target(self, reference: str) -> Any:
        """None where it leads out of the schema, or nowhere."""
        node: Any = self._root
        for step in reference.split("/")[1:] if reference.startswith("#") else [""]:
            key = step.replace("~1", "/").replace("~0", "~")
            node = node.get(key) if isinstance(node, dict) else None
        return node


def _own_width(node: dict[str, Any]) -> int:
    """The longest row of optional properties, for they come in their order; and one for the object itself."""
    required = {name for name in _as(list, node.get("required")) if isinstance(name, str)}
    longest = row = 0
    properties = _as(dict, node.get("properties"))
    for name in properties:
        row = 0 if name in required else row + 1
        longest = max(longest, row)
    return longest + PATTERN_WIDTH * len(_as(dict, node.get("patternProperties"))) + bool(properties)


def _own_patterns(node: dict[str, Any]) -> int:
    return sum(key in node for key in PATTERNS)


def _as(kind: type, value: Any) -> Any:
    return value if isinstance(value, kind) else kind()
