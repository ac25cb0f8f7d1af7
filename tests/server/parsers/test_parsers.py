"""Answers as text, cut anywhere: what the parsers make of them never depends on the cuts, and nothing said is lost."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leyden.configs.schema import ServerConfig
from leyden.engine.errors import ConfigError
from leyden.server.parsers.answer import AnswerParser
from leyden.server.parsers.deltas import CallArguments, CallBegin, Content, PlainText, Reasoning, merged
from leyden.server.parsers.formats import TOOL_FORMATS, ChatFormat
from leyden.server.parsers.json_object import ObjectScanner
from leyden.server.parsers.reasoning import AfterThought, Thinking
from written_calls import FORMATS, JSON_FORMATS, MARKERS, write

NASTY = {
    "plain": {"a": 1},
    "empty": {},
    "nested": {"a": {"b": [{"c": {}}, []]}},
    "braces": {"a": "}}{{][", "b": "]}"},
    "quotes": {"a": 'say "hi"', "b": "back\\slash", "c": '\\"}'},
    "unicode": {"größe": "日本 😀 \u2028", "é": "é"},
    "control": {"a": "tab\tline\nend"},
    "markup": {"a": "<tool_calls> <tool_ </tool </think> <|im_end|>"},
    "numbers": {"a": [1, -2.5, 1e9, True, False, None]},
}
SCHEMAS = {"f": {"type": "object", "properties": {"a": {"type": "integer"}}}}  # for the formats that need types
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMAS["f"]}}]


@dataclass
class Answer:
    content: str
    reasoning: str
    calls: list[tuple[str, str]]

    @classmethod
    def of(cls, deltas):
        calls = []
        for delta in deltas:
            if isinstance(delta, CallBegin):
                assert delta.index == len(calls), "calls are numbered in order"
                calls.append((delta.name, ""))
            elif isinstance(delta, CallArguments):
                assert delta.index == len(calls) - 1, "only the newest call grows"
                calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
        return cls(
            "".join(delta.text for delta in deltas if isinstance(delta, Content)),
            "".join(delta.text for delta in deltas if isinstance(delta, Reasoning)),
            calls,
        )


def make(name: str | None, *, thinks: bool = True, is_thinking: bool = False, hidden=(), max_calls=None):
    parser = PlainText() if name is None else TOOL_FORMATS[name].make(SCHEMAS)
    call = TOOL_FORMATS[name].ends_thought if name else ()
    parser = Thinking(parser, has_begun=is_thinking, call=call) if thinks else parser
    return AnswerParser(parser, hidden=hidden, max_calls=max_calls)


def feed(parser, pieces):
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return merged([*deltas, *parser.finish()])


def read(name, text, **options) -> Answer:
    """The answer that the whole text is, having checked that single characters make the same of it."""
    whole = feed(make(name, **options), [text])
    assert feed(make(name, **options), list(text)) == whole
    for cut in range(1, min(len(text), 400)):
        assert feed(make(name, **options), [text[:cut], text[cut:]]) == whole, f"cut at {cut}"
    return Answer.of(whole)


# -- calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JSON_FORMATS)
@pytest.mark.parametrize("arguments", NASTY.values(), ids=NASTY)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_a_call_is_read_as_the_model_wrote_it(name, arguments, is_ascii):
    raw = json.dumps(arguments, ensure_ascii=is_ascii)
    answer = read(name, write(name, ("f", raw)))
    assert answer == Answer("", "", [("f", raw)])


@pytest.mark.parametrize("name", FORMATS)
def test_text_around_calls_is_content_without_the_white_space_at_the_markers(name):
    first, second = write(name, ("f", '{"a": 1}')), write(name, ("g", "{}"), ("h", '{"b": " }"}'))
    answer = read(name, f" Let me see.\n{first}\n\nAnd\n{second}\n")
    assert answer == Answer(" Let me see.And", "", [("f", '{"a": 1}'), ("g", "{}"), ("h", '{"b": " }"}')])


@pytest.mark.parametrize("name", FORMATS)
def test_a_thought_comes_before_the_calls(name):
    answer = read(name, f"<think>\nI need {{f}}.\n</think>\n\n{write(name, ('f', '{}'))}")
    assert answer == Answer("", "I need {f}.", [("f", "{}")])


@pytest.mark.parametrize("name", FORMATS)
def test_text_that_only_looks_like_a_marker_stays_text(name):
    opening = MARKERS[name][0]
    text = " ".join(opening[:n] for n in range(1, len(opening))) + " <tool <tool_ < <| \n"
    assert read(name, text) == Answer(text, "", [])


@pytest.mark.parametrize("name", FORMATS)
def test_answer_that_ends_in_half_a_marker_keeps_it(name):
    opening = MARKERS[name][0]
    for n in range(1, len(opening)):
        assert read(name, "a " + opening[:n]).content == "a " + opening[:n]


@pytest.mark.parametrize("name", JSON_FORMATS)
def test_call_that_is_cut_off_keeps_its_streamed_arguments(name):
    raw = '{"a": "b", "c": [1, 2]}'
    text = write(name, ("f", raw))
    start = text.index(raw)
    for end in range(start + 1, start + len(raw) + 1):
        answer = read(name, text[:end])
        assert answer.content == ""
        assert [call[0] for call in answer.calls] == ["f"]
        assert answer.calls[0][1] == text[start:end].rstrip() or answer.calls[0][1] == text[start:end]


@pytest.mark.parametrize("name", ["hermes", "minimax"])  # Kimi's markers are single tokens
def test_half_a_closing_marker_of_a_call_is_no_content(name):
    text = write(name, ("f", '{"a": 1}'))
    for end in range(text.index("1}") + 2, len(text) + 1):
        assert read(name, text[:end]).content == "", text[:end]


@pytest.mark.parametrize("name", ["hermes", "minimax"])
@pytest.mark.parametrize(
    "body",
    [
        "",
        " ",
        "no json",
        "{}",
        "[]",
        '{"name": "f"',
        '{"nome": "f", "arguments": {}}',
        '{"name": 5, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "two words", "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no object"}',
        '{"name": "f", "arguments": 5}',
        "{'name': 'f', 'arguments': {}}",
        '{"name": "f" "arguments": {}}',
        '{"name": "f", "name": "g", "arguments": 1}',
        '{"arguments": {"a": 1}}',
        '{"name": "f", "arguments"}',
        '{"name": "' + "x" * 500 + '", "arguments": {}}',
    ],
)
def test_a_malformed_call_becomes_content_as_it_was_written(name, body):
    opening, closing = MARKERS[name]
    text = f"Well: {opening}\n{body}\n{closing} ok"
    assert read(name, text) == Answer(text, "", [])


def test_formats_and_markers_match_the_models_templates():
    assert {name: sorted(known.markers) for name, known in TOOL_FORMATS.items()} == {
        name: sorted(markers) for name, markers in MARKERS.items()
    }


@pytest.mark.parametrize("number", ["tool_calls", "tool_call"])
def test_kimi_sections_are_no_content_in_either_spelling(number):
    call = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    answer = read("kimi_k2", f"I look.<|{number}_section_begin|>{call}<|{number}_section_end|>")
    assert answer == Answer("I look.", "", [("f", "{}")])


@pytest.mark.parametrize("head", ["", "two words", "functions.", "f(x):0", "x" * 80])
def test_a_malformed_kimi_call_becomes_content_without_markers(head):
    text = f"<|tool_call_begin|>{head}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    assert read("kimi_k2", text) == Answer(head + "{}", "", [])


def test_kimi_arguments_that_are_no_object_become_content():
    text = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>5<|tool_call_end|> x"
    assert read("kimi_k2", text) == Answer("functions.f:05x", "", [])


def test_kimi_calls_keep_the_models_ids_and_survive_a_missing_end():
    head = "<|tool_call_begin|>functions.f:{}<|tool_call_argument_begin|>{{}}"
    deltas = feed(make("kimi_k2"), [head.format(3), head.format(4), "<|tool_calls_section_end|>"])
    assert [(delta.name, delta.id) for delta in deltas if isinstance(delta, CallBegin)] == [
        ("f", "functions.f:3"),
        ("f", "functions.f:4"),
    ]


@pytest.mark.parametrize("name", ["hermes", "minimax"])
@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"id": {"x": [1]}, "name": "f", "why": "so", "arguments": {"a": 1}, "z": null}', '{"a": 1}'),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{ "name" :\n"\\u0066" , "arguments" : {"a": 1} , }', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),  # the last brace is missing
        ('{"name": "f", "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"parameters": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"name": "f", "parameters": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f", "arguments": null, "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"name": "f", "parameters": {"a": 1}, "arguments": {"b": 2}}', '{"a": 1}'),
        ('{"name": "f", "parameters": {"a": 1}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": "</tool_call></tool_calls>"}}', '{"a": "</tool_call></tool_calls>"}'),
    ],
)
def test_call_is_read_in_any_layout(name, body, arguments):
    opening, closing = MARKERS[name]
    for text in (f"{opening}\n{body}\n{closing}", f"{opening}{body}{closing}"):
        assert read(name, text) == Answer("", "", [("f", arguments)])


@pytest.mark.parametrize("name", ["hermes", "minimax"])
def test_a_brace_too_many_hides_neither_the_call_nor_the_next(name):
    opening, closing = MARKERS[name]
    call = f'{opening}{{"name": "f", "arguments": {{}}}}}}\n{closing}\n'
    assert read(name, call * 2) == Answer("}}", "", [("f", "{}")] * 2)


def test_a_malformed_line_does_not_hide_the_next_minimax_call():
    answer = read("minimax", '<tool_calls>\n{"nome": 1}\n{"name": "g", "arguments": {}}\n</tool_calls>')
    assert answer == Answer('<tool_calls>\n{"nome": 1}', "", [("g", "{}")])


def test_arguments_go_out_before_the_call_is_complete():
    parser = make("hermes")
    assert parser.push('<tool_call>{"name": "f", "arguments": {"a') == [CallBegin(0, "f"), CallArguments(0, '{"a')]
    assert parser.push('": "b') == [CallArguments(0, '": "b')]


@pytest.mark.parametrize("rest", [":", ":}", ' "x"', ', "arguments":', ', "name":', ", 5:", "]", " x", "<"])
def test_arguments_before_a_mistake_are_kept(rest):
    answer = read("hermes", f'<tool_call>{{"name": "f", "arguments": {{"a": [1]}}{rest}')
    assert answer.calls == [("f", '{"a": [1]}')]


def test_max_calls_leaves_later_calls_out():
    text = write("minimax", ("f", "{}"), ("g", '{"a": 1}'))
    parser = make("minimax", max_calls=1)
    assert Answer.of(feed(parser, [text])).calls == [("f", "{}")]
    assert parser.num_calls == 1


# -- thoughts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_thinking", "reasoning", "content"),
    [
        ("<think>a</think>b", False, "a", "b"),
        ("\n<think>\na\n</think>\n\nb\n", False, "a", "b\n"),
        ("a</think>b", True, "a", "b"),
        ("<think>a</think>b", True, "a", "b"),  # the model repeats what the prompt has
        ("\n\na b\n</think>", True, "a b", ""),
        ("<think></think>b", False, "", "b"),
        ("<think>cut o", False, "cut o", ""),
        ("cut o</thi", True, "cut o</thi", ""),
        ("<th", False, "", "<th"),
        ("<th", True, "<th", ""),
        ("no thought <think>a</think>", False, "", "no thought <think>a</think>"),
        ("a</think>b", False, "", "a</think>b"),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("<think>a < b </ c </think >d</think> e", False, "a < b </ c </think >d", "e"),
        ("  plain", False, "", "  plain"),
        (" " * 100 + "<think>a</think>", False, "", " " * 100 + "<think>a</think>"),
        ("", True, "", ""),
    ],
)
def test_the_thought_is_split_off_where_the_answer_begins_with_one(text, is_thinking, reasoning, content):
    assert read(None, text, is_thinking=is_thinking) == Answer(content, reasoning, [])


THOUGHTS = ["<think>", "</think>", "<", "</", "think>", "\n", " ", " " * 70, "word", "STOP"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pieces=st.lists(st.sampled_from(THOUGHTS), max_size=12), is_thinking=st.booleans(), data=st.data())
def test_stop_strings_count_in_just_the_text_that_is_no_thought(pieces, is_thinking, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    scope, before, after = AfterThought(has_begun=is_thinking), "", ""
    parts = [scope.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for early, late in [*parts, scope.finish()]:
        assert not (after and early), "nothing of the thought follows the answer"
        before, after = before + early, after + late
    assert before + after == text
    assert after == Answer.of(feed(make(None, is_thinking=is_thinking), [text])).content


HERMES = write("hermes", ("f", '{"a": 1}'))


@pytest.mark.parametrize("is_thinking", [False, True])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"a{HERMES}", ("", "a", 1)),
        (f"a{HERMES}\n</think>\n\nb", ("b", "a", 1)),
        (f"a{HERMES}\n</think>\n\nb{HERMES}", ("b", "a", 2)),
        (f"a</think>b{HERMES}", ("b", "a", 1)),
        (f"a <tool_call> b{HERMES}", ("", "a <tool_call> b", 1)),
        ('a <tool_call>\n{"x": 1} b</think>c', ("c", 'a <tool_call>\n{"x": 1} b', 0)),
        ("a <tool_call>\n{", ("", "a <tool_call>\n{", 0)),
        ('a<tool_call>{ "name" : "f", "arguments": {}}</tool_call>', ("", "a", 1)),
    ],
)
def test_a_hermes_call_ends_the_thought_and_no_stray_marker_is_content(is_thinking, text, expected):
    text = text if is_thinking else f"<think>{text}"
    answer = read("hermes", text, is_thinking=is_thinking, hidden=("</think>",))
    assert (answer.content, answer.reasoning, len(answer.calls)) == expected


@pytest.mark.parametrize("name", [name for name in FORMATS if not TOOL_FORMATS[name].ends_thought])
def test_a_call_of_another_format_belongs_to_the_thought(name):
    call = write(name, ("f", "{}"))
    assert read(name, f"<think>a{call}</think>b") == Answer("b", f"a{call}", [])


def test_a_thought_that_the_prompt_has_closed_does_not_come_again():
    chosen = ChatFormat.choose(ServerConfig(reasoning_parser="think"), Templated(""))
    answer = chosen.of_answer(tools=[], thought="over", max_calls=None, hides=True)
    assert (answer.thinks, answer.is_thinking, answer.stop_scope()) == (False, False, None)


def test_hidden_markers_never_reach_the_content():
    hidden = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    text = "<think>a</think>b</think>c <tool_call>{}</tool_call> d <tool_call>{bad</tool_call></tool_"
    assert read("hermes", text, hidden=hidden) == Answer("bc {} d {bad</tool_", "a", [])


# -- all of them ----------------------------------------------------------------------------------------------

PIECES = [
    *sorted({marker for markers in MARKERS.values() for marker in markers}),
    *("<think>", "</think>", "<tool", "_call", "<|", "|>", "<", ">", "</", "\n", " ", "\\", '"', "{", "}", "[", "]"),
    *(":", ",", '{"name": "f", "arguments": ', '"arguments"', '"name"', '"f"', "functions.f:0", "word", "é", "😀", "1"),
    *(write(name, ("f", '{"a": "}"}')) for name in FORMATS),
]


def damaged(name, data):
    """Two calls, with something in place of up to two characters."""
    text = write(name, ("f", '{"a": [1, "}"]}'), ("g", "{}"))
    start = data.draw(st.integers(0, len(text)))
    return text[:start] + data.draw(st.sampled_from(PIECES)) + text[start + data.draw(st.integers(0, 2)) :]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("name", FORMATS)
def test_no_cut_changes_the_deltas(name, data):
    text = data.draw(st.lists(st.sampled_from(PIECES), max_size=25).map("".join)) + damaged(name, data)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    options = {"is_thinking": data.draw(st.booleans()), "hidden": data.draw(st.sampled_from([(), MARKERS[name]]))}
    whole = feed(make(name, **options), [text])
    assert feed(make(name, **options), pieces) == whole
    assert feed(make(name, **options), list(text)) == whole
    Answer.of(whole)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
@pytest.mark.parametrize("name", ["hermes", "minimax"])
def test_text_without_a_call_is_content_as_it_was_written(name, text):
    answer = read(name, text, thinks=False)
    if not answer.calls:
        assert answer.content == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    calls=st.lists(
        st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True), st.dictionaries(st.text(), JSON)),
        min_size=1,
        max_size=3,
    ),
    indent=st.sampled_from([None, 2]),
    is_ascii=st.booleans(),
)
@pytest.mark.parametrize("name", JSON_FORMATS)
def test_any_calls_come_back(name, calls, indent, is_ascii):
    raw = [(function, json.dumps(value, indent=indent, ensure_ascii=is_ascii)) for function, value in calls]
    answer = Answer.of(feed(make(name), list(write(name, *raw))))
    if name == "kimi_k2" and any(marker in text for _, text in raw for marker in MARKERS[name]):
        return
    assert answer == Answer("", "", raw)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=st.dictionaries(st.text(), JSON), tail=st.text(max_size=5))
def test_the_scanner_ends_exactly_behind_any_object(value, tail):
    raw = json.dumps(value, ensure_ascii=False)
    scanner = ObjectScanner()
    assert scanner.feed(raw + tail, 0) == len(raw)
    assert scanner.is_closed
    assert {key: json.loads(scanner.member(key)) for key in value} == value


LONG = {
    "an unclosed call": '{"name": "f", "arguments": {"a": "',
    "an unclosed name": '{"name": "',
    "a late name": '{"arguments": {"a": "',
    "a name that is none": '{"name": "two words", "arguments": {"a": "',
    "deep nesting": '{"name": "f", "arguments": ' + '{"a":' * 20_000,
    "white space": "",
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("start", LONG.values(), ids=LONG)
def test_text_read_again_is_never_longer_than_a_marker(name, start):
    """So that the work grows with the text alone, however it comes and however long a call stays open."""
    calls = TOOL_FORMATS[name].make(SCHEMAS)
    parser = Thinking(calls, has_begun=True)
    longest = max(map(len, MARKERS[name]))
    parser.push("why</think>" + MARKERS[name][0] + start)
    for _ in range(1000):
        parser.push("xy" if start else "  ")
        assert len(parser._sections._text) <= len("</think>")
        assert len(calls._text) - calls._position <= longest
    parser.finish()


# -- the choice -----------------------------------------------------------------------------------------------


class Templated:
    control_ids = frozenset({7, 8})
    added_ids = {"<tool_call>": 7, "<|im_end|>": 8, "</tool_call>": 9}  # noqa: RUF012 - never changed

    def __init__(self, chat_template):
        self.chat_template = chat_template
        self.takes_tools = "tools" in chat_template

    def token_text(self, token_id):
        return {7: "<tool_call>", 8: "<|im_end|>"}[token_id]


@pytest.mark.parametrize(
    ("template", "tools", "thinks"),
    [
        ("plain", None, False),
        ("<tool_calls>\n{tools} <beginning_of_sentence>ai name", "minimax", True),
        ("<tool_call>\n{tools}", "hermes", False),
        ("<tool_call> <think>", "hermes", True),
        ("<tool_call><arg_key>", None, False),  # GLM
        ("<tool_call><function=f>", None, False),
        ("<tool_call>\n{tools}<function=f>\n<parameter=a> <think>", "qwen3_coder", True),  # Qwen3-Coder, Qwen3.5
        ("<minimax:tool_call>", None, False),
        ("<|tool_calls_section_begin|><|tool_call_begin|>", "kimi_k2", False),
    ],
)
def test_auto_reads_the_template(template, tools, thinks):
    chosen = ChatFormat.choose(ServerConfig(), Templated(template))
    assert chosen.tools is TOOL_FORMATS.get(tools)
    assert chosen.thinks == thinks


def test_settings_beat_the_template():
    settings = ServerConfig(tool_call_parser="kimi_k2", reasoning_parser="none")
    chosen = ChatFormat.choose(settings, Templated("{tools} <tool_call><think>"))
    assert (chosen.tools, chosen.thinks) == (TOOL_FORMATS["kimi_k2"], False)
    assert ChatFormat.choose(ServerConfig(tool_call_parser="none"), Templated("<tool_call>")).tools is None


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_parser_of_calls_for_a_template_without_tools_is_refused_at_start(name):
    with pytest.raises(ConfigError, match=f"tool_call_parser is '{name}', but .* does not use tools: .*chat_template"):
        ChatFormat.choose(ServerConfig(tool_call_parser=name), Templated("plain <tool_call>"))


def test_control_tokens_that_are_markers_are_seen_and_hidden():
    chosen = ChatFormat.choose(ServerConfig(), Templated("<tool_call>"))
    plan = chosen.of_answer(tools=TOOLS, thought="none", max_calls=None, hides=True)
    assert (plan.shown_ids, plan.control_ids) == ({7}, {"<tool_call>": 7})
    assert plan.token_ids == {"<tool_call>": 7, "</tool_call>": 9}
    without = chosen.of_answer(tools=[], thought="none", max_calls=None, hides=True)
    assert (without.shown_ids, without.tools) == (frozenset(), None)
