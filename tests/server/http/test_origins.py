"""Without a key, neither a page of another site nor a name that somebody points here can use the server."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

EVIL = "http://evil.example"
DELETE = "/v1/sessions/mine/delete"


@pytest.fixture
def ask(make_client):
    """ask(path, settings, **headers): a POST by default."""

    async def send(path="/tokenize", settings=(), *, method="POST", **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await make_client(**dict(settings)).request(method, path, headers=named)

    return send


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "localhost.",
        "app.localhost:1",
        "127.0.0.1",
        "127.7.7.7:8000",
        "[::1]",
        "[::1]:8000",
        "host.docker.internal:8000",
    ],
)
async def test_local_names_are_answered_on_loopback(ask, host):
    assert (await ask("/v1/models", method="GET", host=host)).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "192.168.1.7",
        "0.0.0.0",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/", "/v1/sessions", "/nowhere"])
async def test_other_names_are_403_on_loopback_and_the_remedy_is_named(ask, error_of, host, path):
    error = error_of(await ask(path, method="GET", host=host), 403)
    assert (error["type"], error["code"]) == ("permission_error", "host_not_allowed")
    assert "allowed_hosts" in error["message"] and "api_key" in error["message"]


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key": ["k"]},
        {"host": "0.0.0.0"},
        {"host": "192.168.1.7"},
        {"allowed_hosts": ["chat.example"]},
        {"allowed_hosts": ["*"]},
    ],
    ids=str,
)
async def test_foreign_names_are_answered_with_a_key_or_other_interface_or_setting(ask, settings):
    headers = {"host": "Chat.Example:8000", "authorization": "Bearer k"}
    assert (await ask("/v1/models", settings, method="GET", **headers)).status_code == 200


FOREIGN = [
    {"origin": EVIL},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"origin": "https://localhost.evil.example"},
    {"origin": EVIL, "sec_fetch_site": "cross-site"},
    {"origin": "http://localhost", "sec_fetch_site": "same-site"},
    {"sec_fetch_site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_writes_of_foreign_pages_are_403_and_change_nothing(ask, error_of, engine, host, headers):
    error = error_of(await ask(DELETE, {"host": host}, content_type="text/plain", **headers), 403)
    assert (error["type"], error["code"]) == ("permission_error", "origin_not_allowed")
    assert "cors_origins" in error["message"] and "api_key" in error["message"]
    assert engine.calls == []
    assert (await ask("/v1/models", {"host": host}, method="GET", **headers)).status_code == 200, "reads are harmless"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://localhost"},
        {"origin": "https://localhost"},
        {"origin": "http://localhost:7", "host": "localhost:7"},
        {"origin": "https://proxy.example", "sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none"},
    ],
    ids=str,
)
async def test_writes_of_programs_and_of_our_own_pages_are_served(ask, engine, headers):
    assert (await ask(DELETE, **headers)).status_code == 200
    assert engine.calls == [("delete", "mine")]


@pytest.mark.parametrize("settings", [{"cors_origins": [EVIL]}, {"cors_origins": ["*"]}, {"api_key": ["k"]}], ids=str)
async def test_writes_of_pages_that_a_setting_names_or_that_have_a_key_are_served(ask, settings):
    headers = {"origin": EVIL, "sec_fetch_site": "cross-site", "authorization": "Bearer k"}
    assert (await ask(DELETE, settings, **headers)).status_code == 200


PREFLIGHT = {
    "access_control_request_method": "POST",
    "access_control_request_headers": "authorization, content-type, x-stainless-os",
}
PAGE = "https://chat.example"


@pytest.mark.parametrize("keys", [[], ["k"]], ids=["open", "with a key"])
async def test_preflight_of_a_named_origin_is_answered_without_a_key(ask, error_of, keys):
    settings = {"cors_origins": [PAGE], "api_key": keys}
    answer = await ask("/v1/chat/completions", settings, method="OPTIONS", origin=PAGE, **PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"]
    assert "authorization" in allowed and "x-stainless-os" in allowed
    refused = await ask("/v1/chat/completions", settings, method="OPTIONS", origin=EVIL, **PREFLIGHT)
    assert error_of(refused, 403)["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in refused.headers


async def test_preflight_allows_private_networks_and_lists_the_methods(ask, error_of):
    settings = {"cors_origins": [PAGE]}
    private = PREFLIGHT | {"access_control_request_private_network": "true"}
    answer = await ask("/v1/chat/completions", settings, method="OPTIONS", origin=PAGE, **private)
    assert (answer.status_code, answer.headers["access-control-allow-private-network"]) == (200, "true")
    error_of(await ask("/v1/chat/completions", settings, method="OPTIONS", origin=EVIL, **private), 403)
    put = PREFLIGHT | {"access_control_request_method": "PUT"}
    refused = await ask("/v1/chat/completions", settings, method="OPTIONS", origin=PAGE, **put)
    assert "not PUT" in error_of(refused, 403)["message"] and "cors_origins" not in refused.text


@pytest.mark.parametrize("settings", [{"cors_origins": [PAGE]}, {"cors_origins": ["*"]}], ids=str)
async def test_answers_errors_and_streams_may_be_read_by_a_named_origin(make_client, settings):
    client = make_client(**settings, api_key=["k"])
    key = {"authorization": "Bearer k"}
    answers = [
        await client.get("/v1/models", headers={"origin": PAGE}),
        await client.get("/nowhere", headers={"origin": PAGE} | key),
        await client.post("/v1/completions", json={"prompt": "a", "x": 1}, headers={"origin": PAGE} | key),
        await client.post("/v1/completions", json={"prompt": "a", "stream": True}, headers={"origin": PAGE} | key),
    ]
    assert [answer.status_code for answer in answers] == [401, 404, 200, 200]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == settings["cors_origins"][0]
        exposed = answer.headers["access-control-expose-headers"]
        assert "x-request-id" in exposed and "x-ignored-parameters" in exposed
    assert "access-control-allow-origin" not in (await client.get("/v1/models")).headers


async def test_cors_is_off_by_default(ask, error_of):
    answer = await ask("/v1/models", method="GET", origin="http://localhost")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    error_of(await ask("/v1/completions", method="OPTIONS", origin=PAGE, **PREFLIGHT), 405)


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("cors_origins", "https://chat.example/", "without a path"),
        ("cors_origins", "chat.example", "scheme://host"),
        ("cors_origins", "https://*.example", "scheme://host"),
        ("cors_origins", "HTTPS://chat.example:443", "leave it out"),
        ("cors_origins", "http://chat.example:80", "leave it out"),
        ("allowed_hosts", "https://chat.example", "without scheme"),
        ("allowed_hosts", "chat.example:8000", "without scheme, port"),
    ],
)
def test_setting_that_is_no_origin_or_name_is_refused_with_the_right_form(make_app, setting, value, remedy):
    with pytest.raises(ValidationError, match=remedy):
        make_app(**{setting: [value]})
