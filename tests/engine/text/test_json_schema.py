"""What would make a grammar explode is bounded, however it is spelt, and what is within the bounds can be parsed."""

from __future__ import annotations

import json

import pytest
from leyden.engine.text import json_schema
from leyden.engine.text.json_schema import MAX_JOINED_PATTERNS, MAX_OPEN_PROPERTIES, PATTERN_WIDTH, check_schema
from tiny_models import byte_tokenizer


def optional(num, prefix="p"):
    properties = {f"{prefix}{i}": {"type": "integer"} for i in range(num)}
    return {"type": "object", "properties": properties}


MOST = MAX_OPEN_PROPERTIES - 1  # the object counts as one
HALF = MAX_OPEN_PROPERTIES // 2
EACH = MAX_OPEN_PROPERTIES // 10 - 1
REQUIRED = optional(4 * MOST) | {"required": [f"p{i}" for i in range(4 * MOST)]}

WITHIN = {
    "optional": (optional(MOST), '{"p0": 1, "p'),
    "nested": ({"type": "object", "properties": {f"p{i}": optional(MOST) for i in range(3)}}, '{"p0": {"'),
    "required": (REQUIRED, '{"p0": 1, '),
    "rows": (optional(2 * MOST) | {"required": [f"p{HALF}", f"p{MOST}", f"p{MOST + HALF}"]}, '{"'),
    "alternatives": ({"anyOf": [optional(EACH, f"a{i}_") for i in range(10)]}, '{"a0_1": 1, "a0_'),
    "many alternatives": ({"anyOf": [optional(1, f"a{i}_") for i in range(HALF)]}, '{"'),
    "patterns": ({"type": "object", "patternProperties": {f"^k{i}$": {} for i in range(MOST // PATTERN_WIDTH)}}, '{"k'),
    "itself": (
        {"$ref": "#/$defs/n", "$defs": {"n": optional(MOST - 1) | {"additionalProperties": {"$ref": "#/$defs/n"}}}},
        '{"x": {"x": {"',
    ),
    "data": ({"const": optional(2 * MOST)}, '{"type'),
    "odd": ({"properties": {"required": {"type": "integer"}}, "required": ["required"]}, '{"required": 1'),
}


@pytest.mark.parametrize(("schema", "beginning"), WITHIN.values(), ids=WITHIN)
def test_schema_within_the_bounds_can_be_parsed(schema, beginning):
    pytest.importorskip("llguidance")
    from leyden.engine.text.grammar import json_grammar, make_matcher
    from llguidance.hf import from_tokenizer

    vocabulary = from_tokenizer(byte_tokenizer(), n_vocab=512, eos_token=0)
    matcher = make_matcher(json_grammar(schema), vocabulary)
    for token_id in vocabulary.tokenize_str(beginning):
        assert matcher.consume_token(token_id), matcher.get_error()
    matcher.compute_bitmask()
    assert not matcher.is_error(), matcher.get_error()


BEYOND = {
    "optional": optional(MOST + 1),
    "nested": {"type": "array", "items": {"type": "object", "properties": {"x": optional(MOST + 1)}}},
    "a row": optional(2 * MOST) | {"required": ["p0"]},
    "alternatives": {"oneOf": [optional(EACH + 1, f"a{i}_") for i in range(10)]},
    "all of them": {"allOf": [optional(HALF, "a"), optional(HALF, "b")]},
    "many alternatives": {"anyOf": [optional(1, f"a{i}_") for i in range(HALF + 1)]},
    "references": {"anyOf": [{"$ref": "#/$defs/a~1"}, {"$ref": "#/$defs/b"}]}
    | {"$defs": {"a/": optional(HALF, "a"), "b": optional(HALF, "b")}},
    "patterns": {"type": "object", "patternProperties": {f"^k{i}$": {} for i in range(MOST)}},
}


@pytest.mark.parametrize("schema", BEYOND.values(), ids=BEYOND)
def test_schema_beyond_a_bound_is_refused_by_the_bound(schema):
    with pytest.raises(ValueError, match=str(MAX_OPEN_PROPERTIES)):
        check_schema(schema)


def matching(num):
    return [{"type": "string", "pattern": f"^.*a{i}.*$"} for i in range(num)]


MANY = MAX_JOINED_PATTERNS + 1
JOINED = {
    "all of them": {"allOf": matching(MANY)},
    "deeper": {"items": {"allOf": [{"allOf": matching(MANY - 1)}, {"format": "date"}]}},
    "a chain": {"$ref": "#/$defs/d0"}
    | {"$defs": {f"d{i}": {"pattern": f"^.*a{i}", "$ref": f"#/$defs/d{i + 1}"} for i in range(MANY)}},
    "with alternatives": {"allOf": [*matching(MANY - 1), {"anyOf": [*matching(1), {"type": "integer"}]}]},
}


@pytest.mark.parametrize("schema", JOINED.values(), ids=JOINED)
def test_many_patterns_for_one_text_are_refused_and_the_bound_named(schema):
    with pytest.raises(ValueError, match=f"than {MAX_JOINED_PATTERNS} patterns"):
        check_schema(schema)


def test_many_patterns_for_many_texts_are_taken():
    check_schema({"anyOf": matching(300)} | {"properties": {str(i): part for i, part in enumerate(matching(300))}})


def test_a_long_chain_of_references_is_refused():
    length = json_schema.MAX_REFERENCES + 2
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    with pytest.raises(ValueError, match="references"):
        check_schema({"$ref": "#/$defs/d0", "$defs": chain})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": 3, "required": {}, "anyOf": None, "$ref": 5},
        {"properties": [], "required": [[]], "patternProperties": "x", "allOf": {}},
        {"$ref": "elsewhere.json#/a"},
        {"$ref": "#/$defs/nothing/at/all"},
        {"$ref": "#"},
    ],
    ids=json.dumps,
)
def test_value_that_is_no_schema_is_left_to_the_compiler(schema):
    check_schema(schema)
