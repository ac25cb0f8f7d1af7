"""Answers that have to be something: what is asked reaches the engine as a sound grammar, or is refused."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from concurrent.futures import Future
from typing import Literal

import msgspec
import openai
import pytest
from leyden.configs.schema import EngineConfig, ServerConfig
from leyden.engine.async_llm import AsyncLLM
from leyden.engine.boundary.in_process import InProcessClient
from leyden.engine.errors import RequestError
from leyden.engine.text import grammar
from leyden.engine.text.json_schema import MAX_OPEN_PROPERTIES
from leyden.engine.text.schema_rewrite import byte_vocabulary
from leyden.engine.text.tokenizer import Tokenizer
from leyden.models.loading.checkpoint import resolve
from leyden.server.door import answer_grammar
from leyden.server.door.answer_grammar import make_form
from leyden.server.door.structured import Asked
from leyden.server.http.app import create_app
from leyden.server.parsers.formats import AnswerFormat
from pydantic import BaseModel
from schemas import SCHEMAS
from tiny_models import byte_tokenizer
from written_calls import write

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
PERSON = '{"name": "Ada", "age": 36}'


@pytest.fixture
def endless_tokenizer(tmp_path):
    """That of a checkpoint in which no token ends an answer."""
    byte_tokenizer(control=()).save_pretrained(tmp_path)
    config = json.loads((resolve("demo") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return Tokenizer(tmp_path)


@pytest.fixture
async def served(make_client):
    """A client of the embedded model, in this process."""
    engine = InProcessClient(EngineConfig(model="demo", device="cpu", max_num_seqs=8, cpu_memory_gb=0.2, num_threads=1))
    await engine.start()
    llm = AsyncLLM(engine, Tokenizer(resolve("demo")))
    yield make_client(create_app(llm, ServerConfig(), model_name="demo"))
    await engine.close()


async def test_the_embedded_model_answers_as_it_has_to(served, chunks_of):
    async def post(route, **body):
        response = await served.post(f"/v1/{route}", json={"max_tokens": 60, "temperature": 1.3, "seed": 1} | body)
        assert response.status_code == 200, response.text
        return response

    message = {"messages": [{"role": "user", "content": "Who are you?"}]}
    answer = await post("chat/completions", response_format=FORMAT, **message)
    text = answer.json()["choices"][0]["message"]["content"]
    assert set(json.loads(text)) == {"name", "age"}
    streamed = chunks_of(await post("chat/completions", response_format=FORMAT, stream=True, **message))
    deltas = [choice["delta"].get("content") or "" for chunk in streamed for choice in chunk["choices"]]
    assert "".join(deltas) == text
    cases = {
        "regex": ("[0-9]{2}:[0-9]{2}", lambda text: re.fullmatch(r"\d\d:\d\d", text)),
        "choice": (["red", "blue sky"], lambda text: text in ("red", "blue sky")),
        "json": (json.dumps(SCHEMA), json.loads),
        "grammar": ('start: ("a" "b")~3', lambda text: text == "ababab"),
    }
    for kind, (wanted, holds) in cases.items():
        answer = await post("completions", prompt="It is", n=3, structured_outputs={kind: wanted})
        assert all(holds(choice["text"]) for choice in answer.json()["choices"]), answer.text
    free = await post("completions", prompt="It is", temperature=0, max_tokens=5, response_format={"type": "text"})
    assert free.json()["usage"]["completion_tokens"] == 5


async def test_the_official_client_parses_into_a_model(served):
    class Sky(BaseModel):
        colour: Literal["red", "blue"]
        is_clear: bool

    client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=served, max_retries=0)
    messages = [{"role": "user", "content": "How is the sky?"}]
    answer = await client.chat.completions.parse(model="demo", messages=messages, response_format=Sky, max_tokens=60)
    assert isinstance(answer.choices[0].message.parsed, Sky)


@pytest.mark.parametrize(
    ("choice", "names"), [("required", ["f", "g"]), ({"type": "function", "function": {"name": "g"}}, ["g"])]
)
async def test_a_call_that_has_to_be_made_is_a_grammar(engine, tokenizer, chat, make_client, choice, names):
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "tools <tool_call>"
    tools = [TOOL, {"type": "function", "function": {"name": "g"}}]
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools, "tool_choice": choice}
    answer = await make_client().post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (request,) = engine.requests
    text = request.sampling_params.grammar
    assert [name for name in ("f", "g") if f'\\"{name}\\"' in text] == names


BAD = {
    "no object": ({"response_format": 3}, "response_format"),
    "no type": ({"response_format": {}}, "response_format.type"),
    "unknown type": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "no name": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    "strict": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": 1}}},
        "response_format.json_schema.strict",
    ),
    "bad schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}},
        "response_format.json_schema.schema",
    ),
    "two kinds": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    "no kind": ({"structured_outputs": {}}, "structured_outputs"),
    "unknown kind": ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
    "bad regex": ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
    "look-around": ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex"),
    "long regex": ({"structured_outputs": {"regex": "a" * 9000}}, "structured_outputs.regex"),
    "no choices": ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    "an empty choice": ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]"),
    "bad grammar": ({"structured_outputs": {"grammar": "start: ((("}}, "structured_outputs.grammar"),
    "bad json": ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    "false": ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
    "both": (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    "large schema": (
        {"structured_outputs": {"json": {"enum": ["x" * 70_000]}}},
        "structured_outputs.json",
    ),
}


@pytest.mark.parametrize("route", ["complete", "chat"])
@pytest.mark.parametrize(("fields", "param"), BAD.values(), ids=BAD)
async def test_form_that_cannot_be_used_is_refused_by_field(engine, asks, error_of, route, fields, param):
    assert error_of(await asks[route](**fields), 400)["param"] == param
    assert not engine.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
    ],
    ids=["response_format", "structured_outputs", "tools"],
)
async def test_a_tokenizer_that_suits_no_grammar_is_the_requests_error(
    engine, tokenizer, endless_tokenizer, make_client, error_of, monkeypatch, fields, param
):
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "tools <tool_call>"
    monkeypatch.setattr(tokenizer, "for_grammars", endless_tokenizer.for_grammars)
    client, body = make_client(), {"messages": [{"role": "user", "content": "Hi"}]}
    error = error_of(await client.post("/v1/chat/completions", json=body | fields), 400)
    assert error["param"] == param and error["message"].startswith(param)
    assert "no token that could end an answer" in error["message"] and not engine.requests
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.fixture
def asking(engine, tokenizer, make_client):
    """asking(place, schema, strict=None) -> the answer where a schema stands in one of `PLACES`."""
    engine.info = msgspec.structs.replace(engine.info, max_model_len=8192)
    tokenizer.chat_template = "tools <tool_call>"
    client = make_client()

    async def ask(place, schema, strict=None):
        path, make, _ = PLACES[place]
        body = make(schema, {} if strict is None else {"strict": strict})
        if "chat" in path:
            body = body | {"messages": [{"role": "user", "content": "Hi"}]}
        return await client.post(path, json=body)

    return ask


def function(schema, strict):
    return {"name": "f", "parameters": schema} | strict


def tool(schema, strict):
    return {"type": "function", "function": function(schema, strict)}


def json_schema(schema, strict):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema} | strict}


# Where a schema may stand: route, the body around it, and how its paths begin.
PLACES = {
    "response_format": (
        "/v1/chat/completions",
        lambda schema, strict: {"response_format": json_schema(schema, strict)},
        "response_format.json_schema.schema",
    ),
    "a completion's response_format": (
        "/v1/completions",
        lambda schema, strict: {"prompt": "Hi", "response_format": json_schema(schema, strict)},
        "response_format.json_schema.schema",
    ),
    "json_object": (
        "/v1/chat/completions",
        lambda schema, strict: {"response_format": {"type": "json_object", "schema": schema}},
        "response_format.schema",
    ),
    "structured_outputs": (
        "/v1/completions",
        lambda schema, strict: {"prompt": "Hi", "structured_outputs": {"json": schema}},
        "structured_outputs.json",
    ),
    "text.format": (
        "/v1/responses",
        lambda schema, strict: {
            "input": "Hi",
            "text": {"format": {"type": "json_schema", "name": "a", "schema": schema} | strict},
        },
        "text.format.schema",
    ),
    "tool": (
        "/v1/chat/completions",
        lambda schema, strict: (
            {"tools": [tool({}, {}) | {"function": {"name": "g"}}, tool(schema, strict)]} | {"tool_choice": "required"}
        ),
        "tools[1].function.parameters",
    ),
    "named tool": (
        "/v1/responses",
        lambda schema, strict: (
            {"input": "Hi", "tools": [{"type": "function"} | function(schema, strict)]}
            | {"tool_choice": {"type": "function", "name": "f"}}
        ),
        "tools[0].parameters",
    ),
    "tool beside a form": (
        "/v1/chat/completions",
        lambda schema, strict: {"tools": [tool(schema, strict)], "response_format": {"type": "json_object"}},
        "tools[0].function.parameters",
    ),
}
STRICT_PLACES = sorted(PLACES.keys() - {"json_object", "structured_outputs"})


@pytest.mark.parametrize("place", PLACES)
async def test_a_schema_of_an_application_is_kept_and_the_rest_of_it_named(engine, asking, place):
    for name, (schema, left_out) in SCHEMAS.items():
        answer = await asking(place, schema)
        assert answer.status_code == 200, (name, answer.text)
        named = answer.headers.get("x-ignored-parameters")
        assert (named.split(", ") if named else []) == [f"{PLACES[place][-1]}.{path}" for path in left_out], name
        assert engine.requests.pop().sampling_params.grammar is not None


@pytest.mark.parametrize("place", STRICT_PLACES)
async def test_a_strict_schema_is_kept_as_a_whole_or_refused(engine, asking, error_of, place):
    for schema, left_out in (each for each in SCHEMAS.values() if each[1]):
        error = error_of(await asking(place, schema, strict=True), 400)
        assert error["param"] == f"{PLACES[place][-1]}.{left_out[0]}" and error["code"] == "unsupported_parameter"
        assert all(path in error["message"] for path in left_out) and "strict: false" in error["message"]
    assert not engine.requests


@pytest.mark.parametrize("place", STRICT_PLACES)
async def test_a_strict_schema_that_is_kept_is_named_nowhere(asking, place, caplog):
    answer = await asking(place, SCHEMA, strict=True)
    assert answer.status_code == 200 and "x-ignored-parameters" not in answer.headers
    assert "left out" not in caplog.text


@pytest.mark.parametrize("place", PLACES)
async def test_log_and_header_name_the_same_ignored_fields(asking, place, caplog):
    answer = await asking(place, {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}})
    named = answer.headers["x-ignored-parameters"]
    assert named.endswith("properties.a.uniqueItems")
    told = [record.args[0] for record in caplog.records if "left out" in record.msg]
    assert told == [re.sub(r"[0-9]+", "", named)]


WRONG = {"type": "object", "properties": {"a": {"type": "thing"}}}


async def test_a_tool_whose_schema_is_wrong_takes_any_object_unless_it_is_strict(asking, error_of):
    for place in ("tool", "tool beside a form"):
        answer = await asking(place, WRONG)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-ignored-parameters"] == PLACES[place][-1]
        error = error_of(await asking(place, WRONG, strict=True), 400)
        assert error["param"] == PLACES[place][-1] and "Invalid type: thing" in error["message"]


async def test_the_parameters_of_all_tools_together_are_bounded(asking, error_of, monkeypatch):
    monkeypatch.setattr(answer_grammar, "MAX_PARAMETERS_CHARS", 50)
    error = error_of(await asking("tool", SCHEMA), 400)
    assert error["param"] == PLACES["tool"][-1] and "at most 50 characters" in error["message"]


async def test_nothing_beside_a_form_is_ignored_in_silence(complete, asks):
    for fields, named in (
        ({"type": "text", "schema": {}}, "response_format.schema"),
        (
            {"type": "json_object", "json_schema": {}, "strict": True},
            "response_format.json_schema, response_format.strict",
        ),
        (FORMAT | {"schema": {}}, "response_format.schema"),
        (
            {"type": "json_schema", "json_schema": FORMAT["json_schema"] | {"description": "Who", "other": 1}},
            "response_format.json_schema.description, response_format.json_schema.other",
        ),
    ):
        for ask in asks.values():
            answer = await ask(response_format=fields)
            assert (answer.status_code, answer.headers["x-ignored-parameters"]) == (200, named)


async def test_schemas_are_read_and_compiled_aside(engine, asking, monkeypatch):
    threads = []
    for module, name in ((answer_grammar, "supported_subset"), (grammar, "make_matcher")):
        work = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *asked, work=work: threads.append(threading.current_thread().name) or work(*asked)
        )
    for place in PLACES:
        assert (await asking(place, {"title": place} | SCHEMA)).status_code == 200
    assert len(threads) > len(PLACES) and {name.partition("_")[0] for name in threads} == {"grammar"}


ONLY = {"auto": (True, True), "required": (True, False), "none": (False, True)}


@pytest.mark.parametrize("choice", ONLY)
async def test_beside_a_form_tools_may_be_called_or_must_or_must_not(engine, tokenizer, make_client, choice):
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "tools <tool_call>"
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "tool_choice": choice}
    answer = await make_client().post("/v1/chat/completions", json=body | {"response_format": FORMAT})
    assert answer.status_code == 200, answer.text
    (request,) = engine.requests
    vocabulary = byte_vocabulary()
    for text, is_taken in zip((write("hermes", ("f", PERSON)), PERSON), ONLY[choice], strict=True):
        matcher = grammar.make_matcher(request.sampling_params.grammar, vocabulary)
        ids = vocabulary.tokenize_str(text)
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == is_taken


async def test_a_grammar_beside_tools_and_a_bad_form_beside_forced_calls_are_refused(
    engine, tokenizer, make_client, error_of
):
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "tools <tool_call>"
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL]}
    for fields, param in (
        ({"structured_outputs": {"grammar": "start: /a/"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "("}, "tool_choice": "required"}, "structured_outputs.regex"),
    ):
        error = error_of(await make_client().post("/v1/chat/completions", json=body | fields), 400)
        assert error["param"] == param


async def test_thought_comes_before_the_answers_form(engine, tokenizer, make_client):
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "<think>"
    body = {"messages": [{"role": "user", "content": "Hi"}], "response_format": FORMAT}
    answer = await make_client().post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert "thought" in engine.requests[0].sampling_params.grammar


ASKED = {
    "response_format": ("/v1/completions", {"prompt": "Hi", "response_format": FORMAT}),
    "structured_outputs.regex": ("/v1/chat/completions", {"structured_outputs": {"regex": "a+"}}),
    "tools": ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "required"}),
    "text.format": ("/v1/responses", {"input": "Hi", "text": {"format": {"type": "json_object"}}}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), ASKED.values(), ids=ASKED)
async def test_engines_error_about_a_grammar_names_the_field_sent(
    engine, tokenizer, make_client, error_of, monkeypatch, request, path, body, stream
):
    async def refuse(sent):
        assert sent.sampling_params.grammar is not None
        raise RequestError("grammar: too slow", "grammar")
        yield

    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "tools <tool_call>"
    monkeypatch.setattr(engine, "generate", refuse)
    if "chat" in path:
        body = body | {"messages": [{"role": "user", "content": "Hi"}]}
    error = error_of(await make_client().post(path, json=body | {"stream": stream}), 400)
    assert request.node.callspec.id.split("-")[0] in error["param"]
    assert "too slow" in error["message"]


async def test_a_schema_that_leaves_too_much_open_is_refused_at_the_door(engine, complete, error_of):
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(MAX_OPEN_PROPERTIES + 1)}}
    asked = {"type": "json_schema", "json_schema": {"name": "wide", "schema": schema}}
    error = error_of(await complete(response_format=asked), 400)
    assert error["param"] == "response_format.json_schema.schema" and str(MAX_OPEN_PROPERTIES) in error["message"]
    assert not engine.requests


async def test_cancelled_request_leaves_the_grammar_to_requests_with_an_equal_one(monkeypatch, eventually):
    shared, asking = Future(), []
    compiler = grammar.GrammarCompiler(byte_vocabulary)
    monkeypatch.setattr(compiler, "compile", lambda text: asking.append(text) or grammar.Grammar(shared))
    asked = Asked("response_format", "json", SCHEMA)
    forms = [asyncio.create_task(make_form(asked, None, AnswerFormat(), compiler)) for _ in range(2)]
    await eventually(lambda: len(asking) == 2)
    forms[0].cancel()
    await asyncio.gather(forms[0], return_exceptions=True)
    shared.set_result(None)
    assert (await forms[1]).grammar == asking[1]
