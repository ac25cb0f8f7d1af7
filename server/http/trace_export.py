"""Spans to a collector over OTLP/HTTP, in batches from a thread of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ... import __version__
from ...engine.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

EXPORT_SECONDS = 2.0  # for a batch, retries included: a collector that is away must not hold up the server's end


@contextlib.contextmanager
def exporting_tracer(endpoint: str | None) -> Iterator[Tracer | None]:
    """A tracer whose spans go to `endpoint`, the last ones at the end; None without one.

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
