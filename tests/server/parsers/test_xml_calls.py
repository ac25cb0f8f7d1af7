"""Qwen3-Coder's calls: values between tags become JSON by the function's schema, wherever the text is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leyden.engine.text.detokenizer import StopScope
from leyden.server.parsers.argument_types import as_json, types_of
from leyden.server.parsers.deltas import CallArguments, CallBegin, Content, Reasoning, merged
from leyden.server.parsers.formats import TOOL_FORMATS, AnswerFormat

EDIT = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "text": {"type": "string"},
        "line": {"type": "integer"},
        "ratio": {"type": "number"},
        "force": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "options": {"$ref": "#/$defs/Options"},
        "mode": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "count": {"type": ["integer", "null"]},
        "untyped": {},
    },
    "$defs": {"Options": {"properties": {"deep": {"type": "boolean"}}}},
}
CALL = "<tool_call>\n<function=edit>\n{}</function>\n</tool_call>"


def value(key, text):
    return f"<parameter={key}>\n{text}\n</parameter>\n"


def answer_format(**options):
    return AnswerFormat(tools=TOOL_FORMATS["qwen3_coder"], schemas={"edit": EDIT}, **options)


def feed(pieces, **options):
    parser = answer_format(**options).parser()
    return merged([*(delta for piece in pieces for delta in parser.push(piece)), *parser.finish()])


def read(text, **options):
    """(content, reasoning, calls), having checked that no cut changes the deltas."""
    whole = feed([text], **options)
    assert feed(list(text), **options) == whole
    for cut in range(1, len(text)):
        assert feed([text[:cut], text[cut:]], **options) == whole, f"cut at {cut}"
    calls = [[delta.name, ""] for delta in whole if isinstance(delta, CallBegin)]
    for delta in whole:
        if isinstance(delta, CallArguments):
            calls[delta.index][1] += delta.text
    content = "".join(delta.text for delta in whole if isinstance(delta, Content))
    return content, "".join(delta.text for delta in whole if isinstance(delta, Reasoning)), [tuple(c) for c in calls]


def arguments_of(text, **options):
    content, _, [(name, arguments)] = read(text, **options)
    assert (content, name) == ("", "edit")
    return json.loads(arguments)


CODE = """def f(a):
    if a < 3 and a > 1:  # </tool_call> <tool_call> <parameter </functio
        return f"{a}\\n\\t\\"é😀\u2028"

"""


@pytest.mark.parametrize(
    "text", ["", "\n", "\n\n", " a ", CODE, "<", "</", "</parameter", "null", "5", "true", '"a"', "\r\n"]
)
def test_a_string_comes_back_with_all_its_characters(text):
    assert arguments_of(CALL.format(value("text", text))) == {"text": text}


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("line", "5", 5),
        ("line", " -5 ", -5),
        ("line", "5.0", 5),
        ("line", "5.5", "5.5"),
        ("line", "five", "five"),
        ("line", "null", None),
        ("line", "true", "true"),
        ("ratio", "5", 5),
        ("ratio", "-2.5e3", -2500.0),
        ("ratio", "NaN", "NaN"),
        ("force", "true", True),
        ("force", "True", True),
        ("force", "False", False),
        ("force", "yes", "yes"),
        ("tags", '["a", "<b>"]', ["a", "<b>"]),
        ("tags", '[\n  "a"\n]', ["a"]),
        ("tags", "a, b", "a, b"),
        ("tags", '["a\nb"]', ["a\nb"]),  # a raw line break in a string
        ("options", '{"deep": true}', {"deep": True}),
        ("options", "[1]", "[1]"),
        ("mode", "null", None),
        ("mode", "None", None),
        ("mode", "5", "5"),
        ("count", "5", 5),
        ("count", "None", None),
        ("untyped", "5", "5"),
        ("unknown", "5", "5"),
    ],
)
def test_value_has_the_type_of_the_schema_where_it_fits(key, text, expected):
    found = arguments_of(CALL.format(value(key, text)))
    assert found == {key: expected} and type(found[key]) is type(expected)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call><function=edit><parameter=path>a</parameter><parameter=line>5</parameter></function></tool_call>",
        "<tool_call>\n <function= edit >\n<parameter= path >a</parameter>\n\n<parameter=line>5</parameter></function>",
        "<function=edit>\n<parameter=path>\na\n</parameter>\n<parameter=line>\n5\n</parameter>\n</function>\n</tool_call>",
        "<function=edit>\n<parameter=path>\na\n</parameter>\n<parameter=line>\n5\n</parameter>\n</function>",
        "<tool_call>\n<function=edit>\n<parameter=path>\na\n<parameter=line>\n5\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=edit>\n<parameter=path>\na\n</parameter>\n<parameter=line>\n5\n</function>\n</tool_call>",
        "<tool_call>\n<function=edit>\n<parameter=path>\na\n</parameter>\n<parameter=line>\n5\n</parameter>\n</tool_call>",
        "<tool_call>\n<function=edit>\n<parameter=path\na\n</parameter>\n<parameter=line\n5\n</parameter>\n</function>",
    ],
)
def test_a_call_is_read_in_any_layout(text):
    assert arguments_of(text) == {"path": "a", "line": 5}


def test_several_calls_also_in_one_section_and_without_arguments():
    one = CALL.format(value("line", "1"))
    open_call = "<tool_call>\n<function=edit>\n" + value("line", "1")
    inner = one.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    for text in (
        f"{one}\n{one}",
        f"<tool_call>\n{inner}\n{inner}\n</tool_call>",
        f"{open_call}{one}",
        f"{inner}\n{inner}",
    ):
        assert read(text) == ("", "", [("edit", '{"line": 1}')] * 2), text
    assert read(CALL.format("")) == ("", "", [("edit", "{}")])
    assert read("<tool_call>\n<function=other>\n" + value("a", "1")) == ("", "", [("other", '{"a": "1"')])


@pytest.mark.parametrize(
    "text",
    [
        "Use <tool_call> for that, or <function=",
        "<tool_call>\n{}\n</tool_call>",
        "<tool_call></tool_call>",
        "<function=two words>",
        "<function=>\n</function>",
        "<function=" + "x" * 80 + ">",
        "<parameter=a>\n1\n</parameter>\n</function>",
        "<tool_call>\n<functio",
        "a </tool_call> b",
    ],
)
def test_text_that_is_no_call_stays_content(text):
    assert read(text) == (text, "", [])


def test_nothing_of_a_call_that_was_cut_off_is_content_or_a_wrong_argument():
    text = "Now. " + CALL.format(value("path", "a.txt") + value("line", "12") + value("text", "x\ny"))
    whole = {"path": "a.txt", "line": 12, "text": "x\ny"}
    for end in range(text.index("edit>") + 5, len(text) + 1):
        content, _, [(_, arguments)] = read(text[:end])
        assert content == "Now."
        assert json.dumps(whole).startswith(arguments), text[:end]
        assert ("}" in arguments) == ("</function>" in text[:end]), text[:end]


def test_a_string_goes_out_as_it_comes_and_other_values_as_a_whole():
    parser = answer_format().parser()
    pieces = ["<tool_call>\n<function=edit>\n", "<parameter=text>\n", "one", "\n", 'tw"o', "\n</para", "meter>"]
    assert [parser.push(piece) for piece in pieces] == [
        [CallBegin(0, "edit")],
        [CallArguments(0, '{"text": "')],
        [CallArguments(0, "one")],
        [],
        [CallArguments(0, '\\ntw\\"o')],
        [],
        [CallArguments(0, '"')],
    ]
    assert [parser.push(piece) for piece in ("\n<parameter=line>\n1", "2\n", "</parameter>\n</function>")] == [
        [CallArguments(0, ', "line": ')],
        [],
        [CallArguments(0, "12}")],
    ]


def test_max_calls_leaves_later_calls_out():
    assert read(CALL.format("") * 2, max_calls=1)[2] == [("edit", "{}")]


# -- thoughts -------------------------------------------------------------------------------------------------

ONE = CALL.format(value("line", "1"))
THINKS = {"thinks": True, "stray": ("</think>",)}


@pytest.mark.parametrize("is_thinking", [False, True])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a{ONE}", ("", "a", 1)),
        (f"a{ONE}\n</think>\n\nb", ("b", "a", 1)),
        (f"a</think>b{ONE}", ("b", "a", 1)),
        (f"a</think>\n</think>\n\nb{ONE}", ("b", "a", 1)),
        ("a</think>b</think>c", ("bc", "a", 0)),
        (f"a <tool_call> b{ONE}", ("", "a <tool_call> b", 1)),
        (
            "a <tool_call>\n{}</tool_call> <function=edit> b</think>c",
            ("c", "a <tool_call>\n{}</tool_call> <function=edit> b", 0),
        ),
        ("a <tool_call>" + " " * 80 + "<function=edit>", ("", "a <tool_call>" + " " * 80 + "<function=edit>", 0)),
        ("a <tool_call>\n<func", ("", "a <tool_call>\n<func", 0)),
        (f"a</think>{CALL.format(value('text', 'x</think>y'))}", ("", "a", 1)),
    ],
)
def test_a_call_ends_the_thought_and_no_stray_marker_is_content(is_thinking, text, expected):
    content, thought, calls = read(text if is_thinking else f"<think>{text}", is_thinking=is_thinking, **THINKS)
    assert (content, thought, len(calls)) == expected
    assert "</think>" not in content


def test_a_marker_within_an_argument_stays():
    text = f"<think>a</think>{CALL.format(value('text', 'x</think>y'))}"
    assert arguments_of(text, **THINKS) == {"text": "x</think>y"}


def test_stop_strings_count_from_a_call_on_that_ends_the_thought():
    scope: StopScope | None = answer_format(is_thinking=True, **THINKS).stop_scope()
    assert scope is not None
    parts = [scope.push(char) for char in f"a STOP{ONE}b"]
    assert "".join(before for before, _ in parts) == "a STOP"
    assert "".join(after for _, after in [*parts, scope.finish()]) == f"{ONE}b"


# -- all of them ----------------------------------------------------------------------------------------------

PIECES = [
    *("<tool_call>", "</tool_call>", "<function=", "<function=edit>", "</function>", "<parameter=", "</parameter>"),
    *("<parameter=line>", "<parameter=text>", "<think>", "</think>", "\n", " ", ">", "<", "</", "edit", "5", "é", '"'),
    *("\\", "{", "}", "a" * 70, "b" * 300, ONE),
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=20).map("".join),
    cuts=st.lists(st.floats(0, 1), max_size=8),
    options=st.sampled_from([{}, THINKS, THINKS | {"is_thinking": True}]),
)
def test_no_cut_changes_the_deltas(text, cuts, options):
    places = [0, *sorted(int(cut * len(text)) for cut in cuts), len(text)]
    whole = feed([text], **options)
    assert feed([text[a:b] for a, b in pairwise(places)], **options) == whole
    assert feed(list(text), **options) == whole


ENDS = ("</parameter>", "<parameter=", "</function>")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(texts=st.dictionaries(st.from_regex(r"[a-z_]{1,20}", fullmatch=True), st.text(), max_size=5))
def test_any_strings_come_back(texts):
    texts = {
        key: text
        for key, text in texts.items()
        if not any(end in text for end in ENDS) and key not in EDIT["properties"]
    }
    deltas = feed(list(CALL.format("".join(value(key, text) for key, text in texts.items()))))
    assert json.loads("".join(delta.text for delta in deltas if isinstance(delta, CallArguments))) == texts


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(found=JSON.filter(lambda found: not isinstance(found, str)), indent=st.sampled_from([None, 2]))
def test_any_json_comes_back_by_its_type(found, indent):
    names = {bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array", dict: "object"}
    types = types_of({"type": [names[type(found)], "string"]}, {})
    assert json.loads(as_json(json.dumps(found, indent=indent), types)) == found


@pytest.mark.parametrize("start", ["<tool_call>", "<function=", "<tool_call>\n<function=edit>\n<parameter=", ONE[:40]])
def test_text_read_again_is_never_longer_than_a_head(start):
    parser = TOOL_FORMATS["qwen3_coder"].make({"edit": EDIT})
    parser.push(start)
    for _ in range(1000):
        parser.push("  ")
        assert len(parser._text) - parser._position <= 256
    parser.finish()


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"anyOf": [{"type": "number"}, {"oneOf": [{"type": "null"}]}]}, {"number", "null"}),
        ({"allOf": [{"$ref": "#/$defs/a"}]}, {"object"}),
        ({"$ref": "#/$defs/loop"}, {"string"}),
        ({"$ref": "#/nowhere"}, {"string"}),
        ({"enum": [1, None]}, {"integer", "null"}),
        ({"const": True}, {"boolean"}),
        ({"items": {}}, {"array"}),
        ({}, {"string"}),
        (True, {"string"}),
        ({"type": 5, "anyOf": 5, "enum": {}}, {"string"}),
    ],
)
def test_types_are_found_wherever_a_schema_names_them(schema, expected):
    root = {"$defs": {"a": {"type": "object"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}]}}}
    assert types_of(schema, root) == expected
