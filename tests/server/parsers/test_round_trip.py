"""Every answer of the server is valid history, whatever the model wrote and wherever it ended."""

from __future__ import annotations

import json
from functools import cache

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leyden.engine.text.tokenizer import Tokenizer
from leyden.server.door.messages import read_messages
from starlette.testclient import TestClient
from tiny_models import byte_tokenizer, save_minimax
from written_calls import FORMATS, JSON_FORMATS, MARKERS, write

TOOLS = [{"name": "f", "parameters": {}}, {"name": "g"}]
ANSWERS = {
    "cut off": '{"a": "b',
    "a raw line break": '{"a": "x\ny"}',
    "NaN": '{"a": NaN, "b": 1e999}',
    "two objects": '{"a": 1}{"b": 2}',
    "a key twice": '{"a": 1, "a": 2}',
    "a lone surrogate": r'{"a": "\ud800"}',
    "a bad escape": r'{"a": "\x"}',
    "digits": '{"a": ' + "9" * 5000 + "}",
    "deep": '{"a":' * 60 + "{}" + "}" * 60,
    "half a key": '{"a',
    "no value": '{"a": }',
}
PIECES = [
    *sorted({marker for markers in MARKERS.values() for marker in markers}),
    *(
        "<think>",
        "</think>",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ":",
        ",",
        "\n",
        " ",
        "NaN",
        "1",
        "é",
        "functions.f:0",
        "\0",
    ),
    *('{"name": "f", "arguments": ', '{"name": "f", "parameters": {"a": ', '"a": 1', r"\ud83d", "<|end|>", "word"),
]
# As checkpoints write the calls of earlier answers; the last one takes nothing but objects.
TEMPLATES = [
    "{{ c.function.arguments | tojson }}",
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
    "{{ 'a' + c.function.arguments }}",
    "{% for k, v in c.function.arguments.items() %}{{ k }}{{ v }}{% endfor %}",
]
relaxed = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def replies(draw, name):
    """An answer in a format, with something in place of a few of its characters, and cut off anywhere."""
    text = draw(st.sampled_from(["", "<think>hm</think>", "I look."])) + write(name, ("f", '{"a": ["}"]}'), ("g", "{}"))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(st.sampled_from(PIECES)) + text[start + draw(st.integers(0, 3)) :]
    return text[: draw(st.integers(0, len(text)))]


@pytest.fixture(scope="module")
def rendering(tmp_path_factory):
    """Tokenizers with templates that write calls in different ways."""
    folder, found = tmp_path_factory.mktemp("tiny"), []
    save_minimax(folder, layer_types=("linear_attention", "full_attention"))
    for arguments in TEMPLATES:
        hf = byte_tokenizer()
        hf.chat_template = (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.reasoning_content }}{{ m.content }}"
            "{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function.name }}"
            f"{arguments}{{% endfor %}}<|end|>{{% endfor %}}"
        )
        hf.save_pretrained(folder)
        found.append(Tokenizer(folder))
    return found


@pytest.fixture
def talk(engine, tokenizer, make_app, rendering):
    """talk(name, reply): ask both routes twice, the second time with their answer in the history, as it came."""
    engine.info = msgspec.structs.replace(engine.info, max_model_len=1 << 16)
    tokenizer.chat_template = "tools"

    @cache
    def client(name):
        return TestClient(make_app(tool_call_parser=name, reasoning_parser="think"), base_url="http://localhost")

    def post(name, path, body):
        response = client(name).post(path, json=body)
        assert response.status_code == 200, (body, response.text)
        return response.json()

    def talk(name, reply):
        engine.reply = reply.encode()
        question, thanks = {"role": "user", "content": "u"}, {"role": "user", "content": "Thanks"}
        tools = [{"type": "function", "function": tool} for tool in TOOLS]
        body = {"messages": [question], "tools": tools}
        message = post(name, "/v1/chat/completions", body)["choices"][0]["message"]
        post(name, "/v1/chat/completions", body | {"messages": [question, message, thanks]})
        body = {"input": [question], "tools": [{"type": "function", **tool} for tool in TOOLS]}
        output = post(name, "/v1/responses", body)["output"]
        post(name, "/v1/responses", body | {"input": [question, *output, thanks]})
        messages, _ = read_messages([question, message, thanks])
        for checkpoint in rendering:
            assert checkpoint.encode_chat(messages)
        return message

    return talk


@pytest.mark.parametrize("name", FORMATS)
@relaxed
@given(data=st.data())
def test_every_answer_is_valid_history(talk, name, data):
    talk(name, data.draw(replies(name)))


@pytest.mark.parametrize("name", JSON_FORMATS)
@pytest.mark.parametrize("arguments", ANSWERS.values(), ids=ANSWERS)
def test_a_call_whose_arguments_are_no_json_is_valid_history(talk, name, arguments):
    message = talk(name, write(name, ("f", arguments)).split(arguments)[0] + arguments)
    (call,) = message["tool_calls"]
    assert arguments.startswith(call["function"]["arguments"]), "as the model wrote it, up to a mistake"


@pytest.mark.parametrize("name", FORMATS)
def test_many_calls_in_one_answer_are_valid_history(talk, name):
    calls = talk(name, write(name, *[("f", json.dumps({"a": i})) for i in range(200)]))["tool_calls"]
    assert len(calls) == 200
