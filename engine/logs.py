"""Log lines as text or as JSON, one per record, with the id of the request that the record is about.

No record can imitate another: control characters (CR, LF, ANSI) are escaped, and a traceback is indented (text) or a
field (JSON). Prompts and keys must not be logged: this module cannot recognise them.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

# The id of the request that the current task serves.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def configure(level: str, log_format: LogFormat) -> None:
    """Send every record of this process to stderr, in one format. `level` is a name of `logging`, in any case."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(log_format == "json")  # otherwise warnings would be lines without JSON
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def printable(text: str) -> str:
    """Escape control characters that a request may have smuggled into a message."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextFormatter(logging.Formatter):
    """`time LEVEL message [request_id]`, then a traceback whose lines are indented."""

    def format(self, record: logging.LogRecord) -> str:
        about = _request_of(record)
        line = f"{_time_of(record)} {record.levelname} {printable(record.getMessage())}"
        lines = [line if about is None else f"{line} [{printable(about)}]"]
        lines += [f"  {printable(part)}" for part in _trace_of(self, record).splitlines()]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object in ASCII: time, level, logger, message, and request_id and exception if the record has them."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": _request_of(record),
            "exception": _trace_of(self, record),
        }
        return json.dumps({name: value for name, value in fields.items() if value})


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _request_of(record: logging.LogRecord) -> str | None:
    """The `request_id` that the caller passed as `extra`, otherwise the id of the request being served."""
    given: str | None = getattr(record, "request_id", None)
    return given or request_id.get()


def _trace_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""
