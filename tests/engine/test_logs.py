"""No record can look like another: one line each, whatever users put into it."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leyden.engine import logs

EVIL = "a\r\n2026-01-01 ERROR forged \x1b[31mred\x1b[0m \u2028 \x00 \x85"


@pytest.fixture(autouse=True)
def _logging_is_put_back():
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


@pytest.fixture
def written(monkeypatch):
    """written(log_format, level) -> the text that is logged from then on, whenever asked for."""

    def start(log_format, level="info"):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        logs.configure(level, log_format)
        return stream.getvalue

    return start


def fail_with(message: str) -> None:
    try:
        raise ValueError(message)
    except ValueError:
        logging.getLogger("leyden.server").exception("it failed")


def test_a_json_record_is_one_object_on_one_line(written):
    text = written("json")
    logging.getLogger("leyden.server").info("served %d", 3, extra={"request_id": "r-1"})
    line = json.loads(text())
    assert text().count("\n") == 1
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "info", "logger": "leyden.server", "message": "served 3", "request_id": "r-1"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_users_cannot_forge_lines_or_colours(written, log_format):
    text = written(log_format)
    logging.getLogger("leyden").warning("name %s", EVIL, extra={"request_id": EVIL})
    assert len(text().splitlines()) == 1
    assert all(c.isprintable() for c in text().rstrip("\n"))


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_cannot_look_like_a_record(written, log_format):
    text = written(log_format)
    fail_with(EVIL)
    first, *rest = text().splitlines()
    assert "it failed" in first and "\x1b" not in text()
    if log_format == "json":
        assert not rest and "ValueError" in json.loads(first)["exception"]
    else:
        assert all(line.startswith("  ") for line in rest) and any("ValueError" in line for line in rest)


@given(st.text())
def test_any_text_is_one_printable_line(message):
    record = logging.LogRecord("leyden", logging.INFO, "", 0, "%s", (message,), None)
    text, line = logs.TextFormatter().format(record), logs.JsonFormatter().format(record)
    assert text.isprintable() and line.isprintable()
    assert json.loads(line)["message"] == message if message else True


def test_the_request_being_served_is_named_where_the_record_does_not_say(written):
    text = written("text")
    token = logs.request_id.set("from-the-task")
    logging.getLogger("leyden").info("one")
    logging.getLogger("leyden").info("two", extra={"request_id": "given"})
    logs.request_id.reset(token)
    logging.getLogger("leyden").info("three")
    assert [line.split(" INFO ")[1] for line in text().splitlines()] == ["one [from-the-task]", "two [given]", "three"]


def test_the_level_is_the_least_that_is_told_and_other_libraries_speak_the_same_format(written):
    text = written("json", "warning")
    logging.getLogger("leyden").info("not told")
    logging.getLogger("uvicorn.error").info("nor this")
    logging.getLogger("uvicorn.error").error("but this")
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # elsewhere in the tests a warning is an error
        warnings.warn("and this", stacklevel=1)
    assert [json.loads(line)["level"] for line in text().splitlines()] == ["error", "warning"]
