"""The grammar of calls that have to be made: it takes what a model is trained to write, and what the parsers read."""

from __future__ import annotations

import pytest
from leyden.engine.text.grammar import json_rule, make_matcher
from leyden.server.door.tools import read_tools
from leyden.server.parsers.forced import forced_grammar
from leyden.server.parsers.formats import TOOL_FORMATS, AnswerFormat
from leyden.server.parsers.reasoning import CLOSE, OPEN
from leyden.server.parsers.xml_arguments import xml_arguments
from leyden.server.wire.requests import ToolChoice
from tiny_models import byte_tokenizer
from written_calls import FORMATS, MARKERS, write

PLACE = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"type": "string"}},
}
TOOLS, _ = read_tools(
    [
        {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
        {"type": "function", "function": {"name": "time"}},
    ]
)
GOOD = ("weather", '{"city": "K\\"ö}ln", "days": 2}')
END = "<|end|>"


@pytest.fixture(params=[False, True], ids=["text markers", "control markers"])
def takes(request):
    """takes(name, text, choice=..., **answer): whether the grammar lets this text be a whole answer."""
    llguidance = pytest.importorskip("llguidance")
    from llguidance.hf import from_tokenizer

    def takes(name, text, *, choice=ToolChoice("required"), tools=TOOLS, otherwise=None, **answer):
        hf = byte_tokenizer()
        markers = [OPEN, CLOSE, *MARKERS[name]]
        if request.param:
            hf.add_special_tokens({"additional_special_tokens": [END, *markers]})
        controls = {marker: hf.convert_tokens_to_ids(marker) for marker in markers} if request.param else {}
        known = AnswerFormat(tools=TOOL_FORMATS[name], token_ids=controls, **answer)
        grammar = llguidance.LLMatcher.grammar_from_lark(forced_grammar(tools, choice, known, otherwise))
        tokens = from_tokenizer(hf, n_vocab=len(hf), eos_token=hf.convert_tokens_to_ids(END))
        matcher = llguidance.LLMatcher(tokens, grammar)
        assert not matcher.get_error()
        ids = hf(text, add_special_tokens=False)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return takes


@pytest.mark.parametrize("name", FORMATS)
def test_required_takes_one_or_more_calls_and_nothing_else(takes, name):
    assert takes(name, write(name, GOOD))
    assert takes(name, write(name, ("time", "{}"), GOOD, GOOD))
    assert not takes(name, "")
    assert not takes(name, "Hello")
    assert not takes(name, write(name, GOOD) + "Hello")
    assert not takes(name, write(name, ("other", "{}")))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("arguments", ["{}", '{"city": "a", "days": "soon"}', '{"city": "a", "x": 1}', "{", "null"])
def test_arguments_follow_the_schema(takes, name, arguments):
    assert not takes(name, write(name, ("weather", arguments)))


OPEN_SCHEMAS = {
    "left out": None,
    "empty": {},
    "without a type": {"properties": {"city": {"type": "string"}}},
    "of several types": {"type": ["object", "null"], "properties": {"city": {"type": "string"}}},
    "alternatives": {"anyOf": [{"properties": {"city": {"type": "string"}}}, {"type": "null"}]},
    "elsewhere": {"$ref": "#/$defs/Place", "$defs": {"Place": {"properties": {"city": {"type": "string"}}}}},
    "no object": {"type": "string"},
}


@pytest.mark.parametrize("schema", OPEN_SCHEMAS.values(), ids=OPEN_SCHEMAS)
def test_arguments_are_an_object_whatever_their_schema_leaves_open(takes, schema):
    tools, _ = read_tools([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    assert takes("hermes", write("hermes", ("f", '{"city": "Rome"}')), tools=tools)
    for arguments in ("5", "null", '"x"', "[]", "true"):
        assert not takes("hermes", write("hermes", ("f", arguments)), tools=tools)


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_function_is_the_only_one(takes, name):
    choice = ToolChoice("required", "weather")
    assert takes(name, write(name, GOOD), choice=choice)
    assert not takes(name, write(name, ("time", "{}")), choice=choice)


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_where_there_may_be_no_more(takes, name):
    assert takes(name, write(name, GOOD), max_calls=1)
    assert not takes(name, write(name, GOOD, GOOD), max_calls=1)


@pytest.mark.parametrize("name", FORMATS)
def test_a_thought_may_come_first(takes, name):
    call = write(name, GOOD)
    assert takes(name, f"<think>\nhm <\n</think>\n\n{call}", thinks=True)
    assert takes(name, call, thinks=True)
    assert takes(name, f"hm\n</think>{call}", thinks=True, is_thinking=True)
    assert not takes(name, call, thinks=True, is_thinking=True)
    assert not takes(name, f"<think>hm</think>{call}", thinks=False)


@pytest.mark.parametrize("name", FORMATS)
def test_beside_a_form_the_answer_is_calls_or_that_form(takes, name):
    call, form = write(name, GOOD), json_rule({"type": "object", "additionalProperties": {"type": "integer"}})
    for text, is_right in (
        (call, True),
        (write(name, GOOD, GOOD), True),
        ('{"a": 1}', True),
        ('{"a": 1}' + call, False),
        (call + '{"a": 1}', False),
        ('{"a": "b"}', False),
        ("Hello", False),
        ("", False),
    ):
        assert takes(name, text, choice=ToolChoice("auto"), otherwise=form) == is_right
        assert (
            takes(name, f"<think>hm</think>{text}", choice=ToolChoice("auto"), otherwise=form, thinks=True) == is_right
        )


# -- Qwen3-Coder's parameters, each by its own schema ---------------------------------------------------------------

EDIT = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "mode": {"enum": ["create", "append"]},
        "why": {"anyOf": [{"$ref": "#/$defs/Why"}, {"type": "null"}]},
        "line": {"type": "integer"},
        "again": {"$ref": "#/properties/line"},
        "where": {"$ref": "#/$defs/Place"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "force": {"type": "boolean"},
    },
    "required": ["path", "line"],
    "$defs": {
        "Why": {"enum": ["typo", "style"], "type": "string"},
        "Place": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Place"}}, "additionalProperties": False},
    },
}
EDIT_TOOLS, _ = read_tools([{"type": "function", "function": {"name": "edit", "parameters": EDIT}}])


def edit(**values):
    inner = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in values.items())
    return f"<tool_call>\n<function=edit>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("values", "is_right"),
    [
        ({"path": "a.txt", "line": "5"}, True),
        ({"path": "", "line": "5"}, True),
        ({"path": 'a <b> </param\n\n"é\\', "line": "5"}, True),
        ({"path": "a</parameter>", "line": "5"}, False),
        ({"path": "a<parameter=line>\n5", "line": "5"}, False),
        ({"path": "a</function>", "line": "5"}, False),
        ({"path": "a", "line": "five"}, False),
        ({"path": "a", "line": '"5"'}, False),
        ({"line": "5"}, False),
        ({"path": "a"}, False),
        ({"path": "a", "line": "5", "other": "5"}, False),
        ({"path": "a", "mode": "create", "line": "5"}, True),
        ({"path": "a", "mode": "delete", "line": "5"}, False),
        ({"path": "a", "why": "typo", "line": "5"}, True),
        ({"path": "a", "why": "null", "line": "5"}, True),
        ({"path": "a", "why": "fun", "line": "5"}, False),
        ({"path": "a", "line": "5", "again": "6"}, True),
        ({"path": "a", "line": "5", "again": "six"}, False),
        ({"path": "a", "line": "5", "where": '{"next": {"next": {}}}'}, True),
        ({"path": "a", "line": "5", "where": '{"next": 5}'}, False),
        ({"path": "a", "line": "5", "note": "any\ntext"}, True),
        ({"path": "a", "line": "5", "force": "true"}, True),
        ({"path": "a", "line": "5", "force": "True"}, False),
    ],
)
def test_each_value_follows_its_own_schema(takes, values, is_right):
    assert takes("qwen3_coder", edit(**values), tools=EDIT_TOOLS) == is_right


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({}, {"any": "text"}, None),
        ({"type": "object", "properties": {}}, {}, {"any": "text"}),
        ({"additionalProperties": {"type": "integer"}}, {"a": "1", "b": "2"}, {"a": "one"}),
        ({"properties": {"a": {}}, "additionalProperties": True}, {"a": "1"}, {"a": "1", "b": "2"}),
        ({"allOf": [{"properties": {"a": {}}, "required": ["a"]}]}, {"a": "1"}, {}),
        ({"anyOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}}]}, {"b": "1"}, {"c": "1"}),
        ({"properties": {"a": False, "b": True}}, {"b": "1"}, {"a": "1"}),
    ],
)
def test_parameters_are_those_of_the_schema(takes, parameters, good, bad):
    tools, _ = read_tools([{"type": "function", "function": {"name": "edit", "parameters": parameters}}])
    assert takes("qwen3_coder", edit(**good), tools=tools)
    assert bad is None or not takes("qwen3_coder", edit(**bad), tools=tools)


def test_a_listed_parameter_is_given_once(takes):
    """Twice would be the same key twice in JSON, the second of which need not follow the property's schema."""
    parameters = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    tools, _ = read_tools([{"type": "function", "function": {"name": "edit", "parameters": parameters}}])
    call, again = edit(a="1"), "<parameter=a>\none\n</parameter>\n</function>"
    assert takes("qwen3_coder", call, tools=tools)
    assert not takes("qwen3_coder", call.replace("</function>", again), tools=tools)
    assert xml_arguments("x", parameters).left_out == ("additionalProperties",)
    assert xml_arguments("x", {"additionalProperties": True}).left_out == ()


def test_keywords_on_texts_and_on_several_parameters_are_told():
    properties = {
        "a": {"type": "string", "pattern": "^x", "maxLength": 5},
        "b<": {},
        "c": {"minimum": 1, "type": "integer"},
    }
    found = xml_arguments("x", {"properties": properties, "minProperties": 1, "anyOf": [{"required": ["a"]}]})
    assert set(found.left_out) == {
        "minProperties",
        "anyOf",
        "properties.a.pattern",
        "properties.a.maxLength",
        "properties.b<",
    }


def test_many_tools_share_the_rules_of_their_texts(takes):
    tools, _ = read_tools(
        [{"type": "function", "function": {"name": f"edit{i}", "parameters": EDIT}} for i in range(60)]
    )
    assert takes("qwen3_coder", edit(path="a", line="5").replace("=edit", "=edit59"), tools=tools)
    known = AnswerFormat(tools=TOOL_FORMATS["qwen3_coder"])
    from llguidance.hf import from_tokenizer

    make_matcher(forced_grammar(tools, ToolChoice("required"), known), from_tokenizer(byte_tokenizer()))
