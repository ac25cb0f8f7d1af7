"""The grammar of calls that have to be made: it takes what a model is trained to write, and what the parsers read."""

from __future__ import annotations

import pytest
from leyden.server.parsers.deltas import CallArguments, CallBegin, merged
from leyden.server.parsers.forced import forced_grammar
from leyden.server.parsers.formats import TOOL_FORMATS, AnswerFormat
from leyden.server.parsers.reasoning import CLOSE, OPEN
from leyden.server.tools import ToolChoice, read_tools
from tiny_models import byte_tokenizer

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


def written(name: str, *calls: tuple[str, str]) -> str:
    layout = TOOL_FORMATS[name].layout
    parts = [
        f"{layout.before_name}{function}{layout.before_arguments.format(number=i)}{arguments}{layout.after_arguments}"
        for i, (function, arguments) in enumerate(calls)
    ]
    return layout.begin + layout.separator.join(parts) + layout.end


@pytest.fixture(params=[False, True], ids=["text markers", "control markers"])
def takes(request):
    """takes(name, text, choice=..., **answer): whether the grammar lets this text be a whole answer."""
    llguidance = pytest.importorskip("llguidance")
    from llguidance.hf import from_tokenizer

    def takes(name, text, *, choice=ToolChoice("required"), **answer):
        hf = byte_tokenizer()
        markers = [OPEN, CLOSE, *TOOL_FORMATS[name].markers]
        if request.param:
            hf.add_special_tokens({"additional_special_tokens": [END, *markers]})
        controls = {marker: hf.convert_tokens_to_ids(marker) for marker in markers} if request.param else {}
        known = AnswerFormat(tools=TOOL_FORMATS[name], control_ids=controls, **answer)
        grammar = llguidance.LLMatcher.grammar_from_lark(forced_grammar(TOOLS, choice, known))
        tokens = from_tokenizer(hf, n_vocab=len(hf), eos_token=hf.convert_tokens_to_ids(END))
        matcher = llguidance.LLMatcher(tokens, grammar)
        assert not matcher.get_error()
        ids = hf(text, add_special_tokens=False)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return takes


FORMATS = sorted(TOOL_FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_the_layout_is_what_the_parser_reads(name):
    parser = TOOL_FORMATS[name].make()
    deltas = merged([*parser.push(written(name, GOOD, ("time", "{}"))), *parser.finish()])
    assert [(d.name if isinstance(d, CallBegin) else d.text) for d in deltas] == [*GOOD, "time", "{}"]
    assert all(isinstance(delta, CallBegin | CallArguments) for delta in deltas)


@pytest.mark.parametrize("name", FORMATS)
def test_required_takes_one_or_more_calls_and_nothing_else(takes, name):
    assert takes(name, written(name, GOOD))
    assert takes(name, written(name, ("time", "{}"), GOOD, GOOD))
    assert not takes(name, "")
    assert not takes(name, "Hello")
    assert not takes(name, written(name, GOOD) + "Hello")
    assert not takes(name, written(name, ("other", "{}")))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("arguments", ["{}", '{"city": 5}', '{"city": "a", "x": 1}', "{", "null"])
def test_arguments_follow_the_schema(takes, name, arguments):
    assert not takes(name, written(name, ("weather", arguments)))


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_function_is_the_only_one(takes, name):
    choice = ToolChoice("required", "weather")
    assert takes(name, written(name, GOOD), choice=choice)
    assert not takes(name, written(name, ("time", "{}")), choice=choice)


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_where_there_may_be_no_more(takes, name):
    assert takes(name, written(name, GOOD), max_calls=1)
    assert not takes(name, written(name, GOOD, GOOD), max_calls=1)


@pytest.mark.parametrize("name", FORMATS)
def test_a_thought_may_come_first(takes, name):
    call = written(name, GOOD)
    assert takes(name, f"<think>\nhm <\n</think>\n\n{call}", thinks=True)
    assert takes(name, call, thinks=True)
    assert takes(name, f"hm\n</think>{call}", thinks=True, is_thinking=True)
    assert not takes(name, call, thinks=True, is_thinking=True)
    assert not takes(name, f"<think>hm</think>{call}", thinks=False)
