"""One OpenTelemetry span per generation request, by the GenAI semantic conventions. Loaded only when `otlp_endpoint` is
set: without it requests cost nothing more, and OpenTelemetry need not be installed.

A span holds numbers and names, never a prompt, an answer or a key.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..answers.events import Events
from ..door.validation import Prepared
from ..errors import describe

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion"}
ABORTED = "client_disconnected"


class TracingMiddleware:
    """Makes a span for each generation request, refused ones too, as a child of the caller's `traceparent`."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app = app
        self.tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = OPERATIONS.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if operation is None:
            await self.app(scope, receive, send)
            return
        parent = TraceContextTextMapPropagator().extract(Headers(scope=scope))
        span = self.tracer.start_span(operation, parent, SpanKind.SERVER)
        span.set_attribute("gen_ai.operation.name", operation)
        span.set_attribute("gen_ai.provider.name", "leyden")
        span.set_attribute("leyden.request_id", scope["state"]["request_id"])

        async def watch_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note_status(span, message["status"])
            await send(message)

        scope["state"]["watch"] = RequestTrace(span, operation).watch
        try:
            await self.app(scope, receive, watch_status)
        finally:
            span.end()


class RequestTrace:
    """Writes the parameters and the token counts of one request into its span."""

    def __init__(self, span: Span, operation: str) -> None:
        self.span = span
        self.operation = operation
        self.started = time.perf_counter()

    def watch(self, prepared: Prepared[Any], model_name: str, answer_id: str, events: Events) -> Events:
        """The same events, observed as they pass."""
        request, params = prepared.request, prepared.choices[0].request.sampling_params
        self.span.update_name(f"{self.operation} {model_name}")
        asked: dict[str, AttributeValue | None] = {
            "gen_ai.request.model": model_name,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "gen_ai.request.seed": request.seed,
            "gen_ai.request.choice.count": request.n,
            "gen_ai.request.stream": request.stream,
            "gen_ai.response.model": model_name,
            "gen_ai.response.id": answer_id,
            "gen_ai.usage.input_tokens": sum(len(prompt.token_ids) for prompt in prepared.prompts),
        }
        self.span.set_attributes({name: value for name, value in asked.items() if value is not None})
        return self._watch(events)

    async def _watch(self, events: Events) -> Events:
        num_tokens: dict[int, int] = {}  # by choice
        reasons: dict[int, str] = {}
        failure: str | None = ABORTED  # replaced when the events end or fail
        try:
            async with aclosing(events) as passing:
                async for choice, output in passing:
                    if not num_tokens:
                        waited = time.perf_counter() - self.started
                        self.span.set_attribute("gen_ai.response.time_to_first_chunk", waited)
                    num_tokens[choice.index] = output.num_output_tokens
                    if output.finish_reason is not None:
                        reasons[choice.index] = output.finish_reason
                    yield choice, output
            failure = None
        except Exception as error:
            failure = describe(error).reason
            raise
        finally:
            self.span.set_attribute("gen_ai.usage.output_tokens", sum(num_tokens.values()))
            self.span.set_attribute("gen_ai.response.finish_reasons", [reasons[index] for index in sorted(reasons)])
            if failure is not None:
                self.span.set_attribute("error.type", failure)
                self.span.set_status(Status(StatusCode.ERROR))


def _note_status(span: Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 400:
        span.set_attribute("error.type", str(status))
    if status >= 500:  # by the conventions a refusal is no error of a server's span
        span.set_status(Status(StatusCode.ERROR))
