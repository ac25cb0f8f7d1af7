"""The text of a custom tool's call comes out of its JSON as it comes, however it is escaped and cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from leyden.server.parsers.custom_input import CustomInput


def read(pieces):
    reader = CustomInput()
    return [*map(reader.push, pieces), reader.finish()]


TEXTS = st.text() | st.text('a"\\/\n\t\u2028é😀\U0001f468', max_size=20)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=TEXTS, is_ascii=st.booleans(), indent=st.sampled_from([None, 1]), data=st.data())
def test_any_text_comes_back_however_it_is_cut(text, is_ascii, indent, data):
    raw = json.dumps({"input": text}, ensure_ascii=is_ascii, indent=indent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert "".join(read(pieces)) == "".join(read(list(raw))) == text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('{"input": "a', "a"),
        (r'{"input": "a\u00', "a"),
        (r'{"input": "a\ud83d', "a"),
        (r'{"input": "a\ud83d"}', "a\N{REPLACEMENT CHARACTER}"),
        (r'{"input": "a\ud83d\n"}', "a\N{REPLACEMENT CHARACTER}\n"),
        (r'{"input": "a\ude00b"}', "a\N{REPLACEMENT CHARACTER}b"),
        (r'{"input": "a\xb\u12x"}', r"a\xb\u12x"),
        ('{"input": "a\nb"}', "a\nb"),
        ('{"input": "a", "b": 1}', "a"),
        ('{"input": 5}', '{"input": 5}'),
        ('{"inpu', '{"inpu'),
        ("{}", "{}"),
        ('{"b": {"c": "' + "x" * 80 + '"}, "input": "a"}', "a"),
        (r'{"b": 1, "input": "\ud83d"}', "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_other_arguments_are_made_the_best_of(raw, text):
    assert "".join(read([raw])) == "".join(read(list(raw))) == text


def test_text_goes_out_before_the_call_is_complete():
    assert read(['{"input": "ab', "cd", "\\", 'nef"}']) == ["ab", "cd", "", "\nef", ""]
