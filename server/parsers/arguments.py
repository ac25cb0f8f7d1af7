"""How a format writes the arguments of a call, as rules of a grammar."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...engine.text.grammar import json_rule

OBJECT = {"type": "object"}


class Arguments(NamedTuple):
    """Lines of a grammar in llguidance's Lark, and the paths of the keywords of the schema that they do not hold."""

    rules: list[str]
    left_out: tuple[str, ...] = ()


def json_arguments(name: str, schema: dict[str, Any]) -> Arguments:
    """The rule `name`: one JSON object that follows the whole schema."""
    return Arguments([f"{name}: {json_rule(schema | OBJECT)}"])
