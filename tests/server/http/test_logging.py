"""What a request leaves in the log: a refusal one line at debug, and with `access_log` every request one at info."""

from __future__ import annotations

import asyncio
import logging

import pytest
from leyden.server.wire.ignored import MAX_TOLD_NAMES

SECRET = "my-secret-diary"
REFUSALS = [
    ("POST", "/v1/completions", {"prompt": SECRET, "n": SECRET}, {}, "400 invalid_request_error"),
    ("POST", "/v1/completions", {"prompt": SECRET, "model": SECRET}, {}, "404 model_not_found"),
    ("GET", "/nowhere", None, {}, "404 unknown_url"),
    ("PUT", "/v1/models", None, {}, "405 method_not_allowed"),
    ("GET", "/v1/models", None, {"authorization": f"Bearer {SECRET}"}, "401 invalid_api_key"),
]


def lines(caplog, level):
    return [
        record.getMessage() for record in caplog.records if record.levelno == level and record.name.startswith("leyden")
    ]


@pytest.mark.parametrize(("method", "path", "body", "headers", "told"), REFUSALS, ids=[case[-1] for case in REFUSALS])
async def test_refusal_is_one_line_at_debug_without_the_requests_text(
    make_client, caplog, method, path, body, headers, told
):
    caplog.set_level("DEBUG", logger="leyden")
    client = make_client(api_key=["k"])
    headers = {"authorization": "Bearer k", "x-request-id": "r-7"} | headers
    await client.request(method, f"{path}?key={SECRET}", json=body, headers=headers)
    assert lines(caplog, logging.DEBUG) == [f"refused: {method} {path}: {told}"]
    assert caplog.records[-1].request_id == "r-7"
    assert SECRET not in caplog.text.replace("HTTP Request", "")


async def test_an_error_after_the_start_is_one_line_too(complete, engine, caplog):
    caplog.set_level("DEBUG", logger="leyden")
    engine.abort_after = 2
    await complete(stream=True)
    assert lines(caplog, logging.ERROR) == ["the request failed (generation_aborted): ApiError"]


async def test_refusal_before_a_request_is_one_line_at_debug(make_live, caplog, eventually):
    caplog.set_level("DEBUG", logger="leyden")
    reader, writer = await asyncio.open_connection("127.0.0.1", make_live().port)
    writer.write(b"nonsense\r\n\r\n")
    await reader.read()
    writer.close()
    assert lines(caplog, logging.DEBUG) == ["refused before there was a request: 400 invalid_request_error"]


async def test_access_log_has_a_line_per_request_and_is_off_by_default(make_client, caplog):
    caplog.set_level("INFO", logger="leyden")
    for access_log, num_lines in ((False, 0), (True, 4)):
        client = make_client(access_log=access_log, api_key=["k"])
        await client.get(f"/v1/models?key={SECRET}")
        client.headers["authorization"] = "Bearer k"
        await client.get("/v1/models")
        await client.post("/v1/completions", json={"prompt": SECRET})
        await client.post("/v1/completions", json={"prompt": SECRET, "stream": True})
        told = lines(caplog, logging.INFO)
        assert len(told) == num_lines
    assert [line.split()[1:4] for line in told] == [
        ["GET", "/v1/models", "401"],
        ["GET", "/v1/models", "200"],
        ["POST", "/v1/completions", "200"],
        ["POST", "/v1/completions", "200"],
    ]
    assert SECRET not in "".join(told)


async def test_a_field_that_is_left_out_is_warned_of_once(complete, client, caplog):
    for _ in range(3):
        await complete(temperatur=0.1, messages_={"a": 1})
    await client.post("/tokenize", json={"prompt": "a", "temperatur": 0.1})
    await client.post("/v1/sessions/a/save", json={"temperatur": 0.1})
    assert [line.split()[2].rstrip(",") for line in lines(caplog, logging.WARNING)] == ["temperatur", "messages_"]


async def test_warnings_of_fields_are_bounded_and_cut(make_app, make_client, caplog):
    app = make_app()
    client = make_client(app)
    for start in range(0, 1000, 100):
        await client.post("/v1/completions", json={"prompt": "a"} | {f"x{start + i}" * 100: 1 for i in range(100)})
    warned = lines(caplog, logging.WARNING)
    assert len(warned) == MAX_TOLD_NAMES + 1
    assert "x-ignored-parameters" in warned[-1]
    assert max(map(len, warned)) < 300
    assert len(app.state.server.ignored_names._told) == MAX_TOLD_NAMES
