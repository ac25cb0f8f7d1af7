"""Sends spans to a collector over OTLP/HTTP, in batches from a thread of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ... import __version__
from ...engine.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

EXPORT_SECONDS = 2.0  # per batch, retries included: a dead collector must not delay the server's end


@contextlib.contextmanager
def exporting_tracer(endpoint: str | None) -> Iterator[Tracer | None]:
    """A tracer that sends its spans to `endpoint`, the last ones when the context ends; None without an endpoint.

    Raises `ConfigError` when OpenTelemetry is not installed.
    """
    if endpoint is None:
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"otlp_endpoint needs OpenTelemetry ({error}): pip install 'leyden[otel]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "leyden", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)))
    try:
        yield provider.get_tracer("leyden", __version__)
    finally:
        provider.shutdown()
