from __future__ import annotations

import asyncio

import httpx
import pytest


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/responses/x", "/v1/completions/", "//v1/completions", "/V1/models", "/redoc", "/%0d%0a"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_unknown_route_is_404_in_the_envelope(client, error_of, method, path):
    error = error_of(await client.request(method, f"http://localhost{path}"), 404)  # whole: "//v1" alone names a host
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1/completions", "/v1/completions"),
        ("/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/v1/health", "/health"),
        ("/v1/tokenize/", "/tokenize"),
        ("/health/", "/health"),
    ],
)
async def test_an_unknown_route_names_the_one_that_was_meant(client, error_of, path, meant):
    error = error_of(await client.get(f"http://localhost{path}"), 404)
    assert error["message"] == f"no such route; did you mean {meant}? GET /openapi.json lists them all"


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/chat", "/v1/%3Cb%3E/"])
async def test_where_nothing_was_meant_nothing_is_suggested(client, error_of, path):
    assert error_of(await client.get(path), 404)["message"] == "no such route; GET /openapi.json lists them all"


READING = [
    "/health",
    "/metrics",
    "/version",
    "/load",
    "/server_info",
    "/get_model_info",
    "/v1/models",
    "/v1/models/tiny",
]


@pytest.mark.parametrize("path", READING)
async def test_head_works_where_get_does(client, path):
    asked, told = await client.head(path), await client.get(path)
    assert (asked.status_code, asked.headers["content-type"]) == (200, told.headers["content-type"])


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("GET", "/v1/responses", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/tiny", "GET, HEAD"),
        ("OPTIONS", "/tokenize", "POST"),
        ("POST", "/version", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/metrics", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_405_and_says_which_are_right(client, error_of, method, path, allowed):
    response = await client.request(method, path)
    error_of(response, 405)
    assert sorted(response.headers["allow"].split(", ")) == sorted(allowed.split(", "))


async def test_a_body_declared_too_large_is_413_before_it_is_read(make_client, error_of):
    client = make_client(max_body_bytes=2000)
    response = await client.post("/v1/completions", json={"prompt": "x" * 2000})
    assert "2000" in error_of(response, 413)["message"]


async def test_a_sender_that_only_declares_a_huge_body_is_answered_at_once(make_live):
    reader, writer = await asyncio.open_connection("127.0.0.1", make_live().port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + b"Content-Length: 9000000000\r\n\r\n")
    status = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    assert b" 413 " in status


async def test_a_chunked_body_is_cut_off_at_the_bound(make_client, error_of):
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(1000):
            sent += 100
            yield b"x" * 100

    headers = {"content-type": "application/json"}
    response = await make_client(max_body_bytes=2000).post("/v1/completions", content=chunks(), headers=headers)
    error_of(response, 413)
    assert sent <= 2200


async def test_a_body_at_the_bound_is_served(make_client):
    body = b'{"prompt": "a"}'
    headers = {"content-type": "application/json"}
    client = make_client(max_body_bytes=1024)
    assert (await client.post("/v1/completions", content=body.ljust(1024), headers=headers)).status_code == 200
    assert (await client.post("/v1/completions", content=body.ljust(1025), headers=headers)).status_code == 413


@pytest.mark.parametrize("path", ["complete", "chat"])
async def test_another_model_is_404(path, asks, error_of):
    error = error_of(await asks[path](model="gpt-4"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_429_with_retry_after_even_for_a_stream(complete, error_of, engine, stream):
    engine.queue_bound = 0
    response = await complete(stream=stream)
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_are_all_admitted_or_none(complete, error_of, engine, stream):
    engine.queue_bound = 3
    error_of(await complete(prompt=["a", "b"], n=2, stream=stream), 429)
    assert engine.num_open == 0
    assert engine.num_aborted == 3


@pytest.mark.parametrize("path", ["complete", "chat"])
@pytest.mark.parametrize("fault", ["die_after", "fail_after", "abort_after"])
async def test_an_engine_fault_is_500_and_leaks_nothing(path, fault, asks, error_of, engine):
    setattr(engine, fault, 3)
    response = await asks[path]()
    assert error_of(response, 500)["type"] == "server_error"
    assert "secret" not in response.text


async def test_a_bug_is_500_and_leaks_nothing(complete, error_of, tokenizer):
    def broken(text, add_special_tokens=True):
        raise RuntimeError("secret internals")

    tokenizer.encode = broken
    response = await complete()
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


async def test_the_next_request_is_served_after_a_failed_one(complete, engine):
    engine.fail_after = 2
    await complete()
    engine.fail_after = None
    assert (await complete()).status_code == 200


async def test_users_text_in_an_error_is_escaped_and_cut(complete, error_of):
    error = error_of(await complete(logit_bias={"\x1b[31mred\r\n" + "x" * 9999: "no number"}), 400)
    assert error["param"].startswith("logit_bias.\\x1b[31mred\\r\\n")
    assert error["message"].isprintable()
    assert len(error["message"]) + len(error["param"]) < 1300


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [("abc-123_X.y:z", "abc-123_X.y:z"), ("a b\tc", "abc"), ("<script>", "script"), ("x" * 500, "x" * 128)],
)
async def test_the_request_id_is_echoed_without_unsafe_characters(client, sent, echoed):
    response = await client.get("/version", headers={"x-request-id": sent})
    assert response.headers["x-request-id"] == echoed


@pytest.mark.parametrize("headers", [{}, {"x-request-id": ""}, {"x-request-id": "\t \x7f"}])
async def test_a_request_id_is_made_when_none_is_usable(client, headers):
    first = await client.get("/version", headers=headers)
    second = await client.get("/nowhere", headers=headers)
    assert len(first.headers["x-request-id"]) == 32
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_over_max_connections_work_is_503_and_reading_routes_still_answer(
    make_client, error_of, engine, eventually
):
    engine.hold_after = 1
    client = make_client(max_connections=2)
    held = [asyncio.create_task(client.post("/v1/completions", json={"prompt": "a"})) for _ in range(2)]
    await eventually(lambda: engine.num_open == 2)
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/v1/sessions/a/save"):
        response = await client.post(path, json={})
        assert error_of(response, 503)["type"] == "overloaded"
        assert response.headers["retry-after"]
    for path in ("/health", "/metrics", "/load", "/v1/models", "/v1/models/tiny", "/server_info", "/v1/sessions"):
        assert (await client.get(path)).status_code == 200, path
    engine.hold_after = None
    assert [(await task).status_code for task in held] == [200, 200]
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200


async def test_openapi_names_every_route_and_body(client):
    document = (await client.get("/openapi.json")).json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["required"]
    assert "$ref" not in str(body)
    expected = {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/sessions",
        "/v1/sessions/{session_id}",
        "/v1/sessions/{session_id}/save",
        "/v1/sessions/{session_id}/restore",
        "/v1/sessions/{session_id}/delete",
        "/v1/models",
        "/v1/models/{model_id}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/version",
        "/metrics",
        "/load",
        "/server_info",
        "/get_model_info",
    }
    assert set(document["paths"]) == expected


async def test_two_apps_in_one_process_do_not_collide(make_app):
    for app in (make_app(), make_app()):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            assert (await client.get("/metrics")).status_code == 200
