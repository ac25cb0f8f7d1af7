"""One span per generation request, under the GenAI conventions, and nothing of it without a tracer."""

from __future__ import annotations

import subprocess
import sys

import pytest
from callers import Caller
from leyden.configs.schema import ServerConfig
from leyden.engine.async_llm import AsyncLLM
from leyden.engine.errors import ConfigError
from leyden.server.http.app import create_app
from leyden.server.http.trace_export import exporting_tracer

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KEY = "correct-horse"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def app(engine, tokenizer, exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    llm, settings = AsyncLLM(engine, tokenizer), ServerConfig(api_key=[KEY])
    return create_app(llm, settings, model_name="tiny", tracer=provider.get_tracer("test"))


@pytest.fixture
def client(app, make_client):
    client = make_client(app)
    client.headers["authorization"] = f"Bearer {KEY}"
    return client


async def test_a_chats_span_has_the_conventions_names(client, exporter):
    body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5, "top_p": 0.75, "seed": 3}
    body |= {"max_tokens": 5, "stream": True}
    response = await client.post("/v1/chat/completions", json=body, headers={"x-request-id": "r-1"})
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind, span.status.status_code) == ("chat tiny", SpanKind.SERVER, StatusCode.UNSET)
    facts = dict(span.attributes)
    assert 0 < facts.pop("gen_ai.response.time_to_first_chunk") <= (span.end_time - span.start_time) / 1e9
    assert facts.pop("gen_ai.response.id") in response.text
    assert facts == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "leyden",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 6,
        "gen_ai.usage.output_tokens": 5,
        "http.response.status_code": 200,
        "leyden.request_id": "r-1",
    }


async def test_span_has_the_answers_usage_with_several_prompts_and_choices(client, exporter):
    usage = (await client.post("/v1/completions", json={"prompt": ["a", "bc"], "n": 2})).json()["usage"]
    (span,) = exporter.get_finished_spans()
    assert span.name == "text_completion tiny"
    assert span.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert span.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",) * 4


async def test_the_callers_trace_goes_on(client, exporter):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    await client.post("/v1/completions", json={"prompt": "a"}, headers={"traceparent": "00-nonsense"})
    first, second = exporter.get_finished_spans()
    assert (f"{first.context.trace_id:032x}", f"{first.parent.span_id:016x}") == (TRACE, PARENT)
    assert second.parent is None


@pytest.mark.parametrize(
    ("request_", "status", "is_error"),
    [
        ({"json": {"prompt": "a", "n": "x"}}, 400, False),
        ({"json": {"prompt": "a"}, "headers": {"authorization": "Bearer wrong"}}, 401, False),
        ({"content": b"{"}, 415, False),
    ],
)
async def test_a_refusal_is_a_span_with_its_status(client, exporter, request_, status, is_error):
    assert (await client.post("/v1/completions", **request_)).status_code == status
    (span,) = exporter.get_finished_spans()
    assert (span.attributes["http.response.status_code"], span.attributes["error.type"]) == (status, str(status))
    assert (span.status.status_code is StatusCode.ERROR) == is_error


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_is_an_error_of_the_span(client, engine, exporter, stream):
    engine.fail_after = 2
    await client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == ("generation_failed" if stream else "500")
    assert span.attributes["gen_ai.usage.output_tokens"] == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_span_and_its_sequence(engine, tokenizer, exporter, eventually, stream):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    llm = AsyncLLM(engine, tokenizer)
    app = create_app(llm, ServerConfig(), model_name="tiny", tracer=provider.get_tracer("test"))
    engine.hold_after = 3
    caller = Caller(app, {"prompt": "a", "stream": stream})
    await eventually(lambda: engine.num_open == 1)
    caller.leave()
    await caller.ended()
    (span,) = exporter.get_finished_spans()
    assert span.attributes["error.type"] == "client_disconnected"
    assert (engine.num_open, engine.num_aborted) == (0, 1)


async def test_prompts_answers_and_keys_are_in_no_span(client, engine, exporter):
    engine.reply = b"the answer"
    body = {"prompt": "my secret diary", "stop": ["hidden"], "user": "alice"}
    await client.post("/v1/completions", json=body)
    text = "".join(span.to_json() for span in exporter.get_finished_spans())
    for private in ("secret", "the answer", "hidden", "alice", KEY):
        assert private not in text


async def test_other_routes_make_no_span(client, exporter):
    for path in ("/health", "/metrics", "/v1/models", "/v1/completions"):
        await client.get(path)
    await client.post("/tokenize", json={"prompt": "a"})
    assert exporter.get_finished_spans() == ()


def test_without_an_endpoint_nothing_is_loaded():
    code = (
        "import sys; from leyden.server.http.trace_export import exporting_tracer\n"
        "import leyden.server.http.app\n"
        "with exporting_tracer(None) as tracer: assert tracer is None\n"
        "print([name for name in sys.modules if name.startswith('leyden.server.http.tracing')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'leyden\[otel\]'"), exporting_tracer("http://x/v1/traces"):
        pass
