"""What is kept of a schema is kept, what is not is named, and rewriting changes no meaning."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest
from leyden.engine.text import schema_rewrite, schema_subset
from leyden.engine.text.grammar import json_grammar, json_rule, make_matcher
from leyden.engine.text.json_schema import MAX_OPEN_PROPERTIES
from leyden.engine.text.schema_rewrite import byte_vocabulary, rewrite
from leyden.engine.text.schema_subset import supported_subset
from schemas import INTEGER, SCHEMAS, STRING, record

pytest.importorskip("llguidance")
jsonschema_rs = pytest.importorskip("jsonschema_rs")

MAX_BYTES = 400
CLOSING = b'"}],:'


def written(schema, seed) -> str | None:
    """A random answer, byte by byte, as the grammar's masks allow; None where it does not come to an end.

    Letters a and b come often, which the names of the schemas here are made of, and so does all that closes.
    """
    vocabulary, draw, answer = byte_vocabulary(), random.Random(seed), bytearray()
    matcher = make_matcher(f"start: {json_rule(schema)}\n", vocabulary)
    while len(answer) < MAX_BYTES and not matcher.is_stopped():
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        assert allowed, f"nothing may follow {bytes(answer)!r}"
        if vocabulary.eos_token in allowed and draw.random() < 0.4:
            break
        liked = [token for token in allowed if token in set(CLOSING if draw.random() < 0.3 else b"ab12")]
        token = draw.choice(liked or allowed)
        if token == vocabulary.eos_token:
            break
        assert matcher.consume_token(token), matcher.get_error()
        answer.append(token)
    if len(answer) == MAX_BYTES:
        return None
    assert matcher.is_accepting(), f"broken off: {bytes(answer)!r}"
    return answer.decode()


def assert_holds(schema, seeds=range(8)) -> None:
    """Every answer under the kept part is valid under it, and under the whole schema where nothing is left out."""
    kept, left_out = supported_subset(schema)
    oracles = [jsonschema_rs.validator_for(each) for each in ([kept] if left_out else [kept, schema])]
    for text in filter(None, (written(kept, seed) for seed in seeds)):
        value = json.loads(text)
        assert all(oracle.is_valid(value) for oracle in oracles), (text, kept)


@pytest.mark.parametrize("name", SCHEMAS)
def test_kept_keywords_hold_and_the_rest_is_named(name):
    schema, expected = SCHEMAS[name]
    before = json.dumps(schema)
    assert sorted(supported_subset(schema).left_out) == sorted(expected)
    assert_holds(schema)
    assert json.dumps(schema) == before
    if not expected:
        make_matcher(json_grammar(schema), byte_vocabulary())  # offline, too


def leaf(draw):
    return draw.choice([INTEGER, STRING, {}, {"enum": [1, 2]}, {"const": "a"}, False])


def random_object(draw):
    """With names and patterns that meet in every way."""
    schema = {
        "type": "object",
        "properties": {n: leaf(draw) for n in draw.sample(["a", "ab", "b"], draw.randint(0, 3))},
    }
    if draw.random() < 0.7:
        patterns = draw.sample(["^a", "b$", "^ab$", "^(a|b)$", "a", ".*", "^[ab]{1,2}$"], draw.randint(1, 2))
        schema["patternProperties"] = {pattern: leaf(draw) for pattern in patterns}
    elif draw.random() < 0.4:
        names = draw.choice([{"enum": ["a", "ab"]}, {"pattern": "^a"}, {"type": "string"}, {"const": "b"}])
        schema["propertyNames"] = names
    if draw.random() < 0.5:
        schema["required"] = [name for name in ("a", "ab", "b") if draw.random() < 0.4]
    if draw.random() < 0.6:
        schema["additionalProperties"] = leaf(draw)
    return schema


def allows_nothing(schema) -> bool:
    """As llguidance finds out, which is then an error."""
    try:
        supported_subset(schema)
    except ValueError as error:
        return "nsatisfiable" in str(error) or "allows no value" in str(error)
    return False


@pytest.mark.parametrize("seed", range(40))
def test_names_patterns_and_alternatives_together_never_break_an_answer(seed):
    draw = random.Random(seed)
    schema = random_object(draw)
    joined = draw.choice(["allOf", "anyOf", "oneOf", None])
    if joined:
        schema[joined] = [random_object(draw) for _ in range(draw.randint(1, 2))]
    if not allows_nothing(schema):
        assert_holds(schema, range(6))


APART = {
    "types": [STRING, {"type": ["integer", "null"]}],
    "values": [{"enum": [1, "a"]}, {"enum": [True, 2, "b"]}],
    "a name for each": [record({"k": {"const": "a"}}), record({"k": {"enum": ["b", "c"]}})],
    "needed by one, closed in the other": [record({"a": {}}), record({"b": {}}, additionalProperties=False)],
    "deeper": [record({"k": {"anyOf": [{"const": "a"}, {"const": "b"}]}}), record({"k": {"const": "c"}})],
}
MEETING = {
    "numbers": [INTEGER, {"type": "number"}],
    "an integer that is written as a number": [{"const": 1}, {"enum": [1.0]}],
    "optional": [{"type": "object", "properties": {"k": {"const": "a"}}}, record({"j": {"const": "b"}})],
    "a pattern": [
        record({"a": {}}),
        {"type": "object", "additionalProperties": False, "patternProperties": {"^a": {}}},
    ],
    "anything": [{}, STRING],
}


@pytest.mark.parametrize(
    ("alternatives", "are_apart"),
    [(each, True) for each in APART.values()] + [(each, False) for each in MEETING.values()],
    ids=[*APART, *MEETING],
)
def test_one_of_becomes_any_of_only_where_no_value_fits_two(alternatives, are_apart):
    references = [{"$ref": f"#/$defs/d{i}"} for i in range(len(alternatives))]
    schema = {"oneOf": references, "$defs": {f"d{i}": part for i, part in enumerate(alternatives)}}
    assert ("anyOf" in rewrite(schema)) == are_apart
    assert supported_subset(schema).left_out == (() if are_apart else ("oneOf",))
    assert_holds(schema)


def test_error_of_a_schema_is_told_and_not_left_out():
    wrong = {
        "allows no value": {"not": {}},
        "Invalid type: thing": {"properties": {"a": {"type": "thing", "format": "url"}}},
        "Resource": {"$ref": "http://example.com/schema"},
        str(MAX_OPEN_PROPERTIES): {"properties": {"default": {"properties": {f"p{i}": {} for i in range(460)}}}},
    }
    for told, schema in wrong.items():
        with pytest.raises(ValueError, match=told):
            supported_subset(schema)


NONSENSE = [None, 1, "a", [], {}, [[]], [{}], [None], {"a": None}, {"a": [1]}, {"$ref": 1}, {"type": {}}, {"enum": 3}]
KEYWORDS = ["properties", "patternProperties", "required", "propertyNames", "oneOf", "anyOf", "not", "type", "enum"]


@pytest.mark.parametrize("keyword", [*KEYWORDS, "$ref", "additionalProperties", "format"])
def test_nonsense_is_an_error_of_the_schema_if_anything(keyword):
    names = {"propertyNames": {"enum": ["a"]}, "oneOf": [record({"a": INTEGER}), {"required": [[]], "anyOf": {}}]}
    for nonsense in NONSENSE:
        for around in ({}, names, {"patternProperties": {"^a": {}, "(": {}}, "properties": {"a": {}}}):
            with contextlib.suppress(ValueError):
                supported_subset(around | {keyword: nonsense})


def test_names_held_by_a_reference_and_more_are_not_held_by_the_reference_alone():
    names = {"$ref": "#/$defs/names", "pattern": "^a"}
    schema = {"type": "object", "propertyNames": names, "$defs": {"names": {"enum": ["a", "b"]}}}
    assert supported_subset(schema).left_out == ("propertyNames",)
    del names["pattern"]
    assert supported_subset(schema).left_out == ()
    assert_holds(schema)


@pytest.mark.parametrize(
    "within", [lambda part: {"items": part}, lambda part: {"allOf": [part]}, lambda part: record({"a": part})]
)
def test_any_depth_is_kept_or_refused(within):
    schema, outcomes = {"type": "string", "format": "url"}, set()
    for depth in range(1, 500):
        schema = within(schema)
        if depth in (5, 40, 126, 499):
            try:
                outcomes.add(len(supported_subset(schema).left_out))
            except ValueError:
                outcomes.add("refused")
    assert outcomes == {1, "refused"}


def test_a_schema_is_looked_at_once_however_often_it_is_sent(monkeypatch):
    tried = []
    make = schema_subset.make_matcher
    monkeypatch.setattr(schema_subset, "make_matcher", lambda *asked: tried.append(asked) or make(*asked))
    schema = record({f"p{i}": {"type": "string", "format": "url", "minLength": i} for i in range(3)})
    first, num_tried = supported_subset(schema), len(tried)
    assert first.left_out == tuple(f"properties.p{i}.format" for i in range(3))
    assert supported_subset(json.loads(json.dumps(schema))) == first and len(tried) == num_tried


def test_the_work_on_one_schema_is_bounded(monkeypatch):
    monkeypatch.setattr(schema_subset, "MAX_TRIED", 3)
    formats = record(
        {f"p{i}": {"type": "string", "format": f} for i, f in enumerate(["date", "x", "date", "y", "time"])}
    )
    assert supported_subset(formats).left_out == tuple(f"properties.p{i}.format" for i in (1, 3, 4))
    monkeypatch.setattr(schema_rewrite, "MAX_COMPARED", 50)
    patterns = {f"^{i}": {} for i in range(10)}
    with pytest.raises(ValueError, match="more than 50 pairs"):
        supported_subset(record({f"p{i}": {} for i in range(10)}, patternProperties=patterns))
    one_of = [record({"k": {"const": i}}) for i in range(9)]
    assert "oneOf" in rewrite({"oneOf": one_of})  # not looked at any further
