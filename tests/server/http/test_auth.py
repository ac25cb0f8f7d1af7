from __future__ import annotations

import hmac

import httpx
import pytest
from leyden.engine.errors import ConfigError

KEY = "correct-horse"
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/models"),
    ("GET", "/v1/sessions"),
    ("POST", "/v1/sessions/a/save"),
    ("POST", "/v1/sessions/a/restore"),
    ("POST", "/v1/sessions/a/delete"),
    ("DELETE", "/v1/sessions/a"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/openapi.json"),
    ("GET", "/load"),
    ("GET", "/server_info"),
    ("GET", "/get_model_info"),
    ("GET", "/nowhere"),
]
SPELLINGS = [
    "//v1/models",
    "/V1/models",
    "/v1/models/",
    "/health/",
    "//health",
    "/HEALTH",
    "/health/../v1/models",
    "/v1/models?path=/health",
    "/health;/v1/models",
    "/%68ealth/",
]


@pytest.fixture
def guarded(make_client):
    return make_client(api_key=["another", KEY])


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_but_health_and_pages_needs_a_key(guarded, error_of, method, path):
    response = await guarded.request(method, path)
    error = error_of(response, 401)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", SPELLINGS)
async def test_no_spelling_of_a_path_slips_past_the_key(guarded, error_of, path):
    error_of(await guarded.get(f"http://localhost{path}"), 401)  # whole: "//health" alone names a host


async def test_health_needs_no_key(guarded):
    assert (await guarded.get("/health")).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("key", ["another", KEY])
async def test_any_configured_key_opens(guarded, scheme, key):
    response = await guarded.get("/v1/models", headers={"authorization": f"{scheme} {key}"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        b"Bearer correct-hors",
        b"Bearer correct-horse1",
        b"Bearer CORRECT-HORSE",
        b"Basic correct-horse",
        b"correct-horse",
        b"Bearer\tcorrect-horse",
        b"Bearer another,correct-horse",
        "Bearer correct-hörse".encode(),
        b"Bearer \xff\xfe",
    ],
)
async def test_a_wrong_header_is_401(guarded, error_of, value):
    error_of(await guarded.get("/v1/models", headers=[(b"authorization", value)]), 401)


async def test_two_authorization_headers_are_401(guarded, error_of):
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer wrong")]
    error_of(await guarded.get("/v1/models", headers=headers), 401)


async def test_a_key_that_is_not_ascii_works(make_client):
    client = make_client(api_key=["schlüssel"])
    headers = [(b"authorization", "Bearer schlüssel".encode())]
    assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_keys_come_from_a_file_too(make_client, tmp_path):
    path = tmp_path / "keys"
    path.write_text("\nfirst\n second \n")
    client = make_client(api_key=["third"], api_key_file=path)
    for key in ("first", "second", "third"):
        assert (await client.get("/version", headers={"authorization": f"Bearer {key}"})).status_code == 200
    assert (await client.get("/version", headers={"authorization": "Bearer fourth"})).status_code == 401


@pytest.mark.parametrize("content", [None, "", "\n \n"])
def test_a_key_file_without_keys_stops_the_start_instead_of_opening_the_door(make_app, tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="api_key_file"):
        make_app(api_key_file=path)


def test_an_empty_key_stops_the_start(make_app):
    with pytest.raises(ConfigError, match="api_key"):
        make_app(api_key=[""])


@pytest.mark.parametrize("content", ["# keys of team a\nfirst\n", "first second\n", "first\tremark\n"])
def test_a_line_of_a_key_file_that_is_no_single_word_stops_the_start(make_app, tmp_path, content):
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ConfigError, match="no blank"):
        make_app(api_key_file=path)


async def test_without_keys_everyone_is_served(client):
    assert (await client.get("/v1/models")).status_code == 200


async def test_a_mounted_prefix_does_not_make_another_path_public(make_app):
    transport = httpx.ASGITransport(app=make_app(api_key=[KEY]), root_path="/health")
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await client.get("/health/v1/models")).status_code == 401


async def test_keys_and_prompts_stay_out_of_the_log(make_client, caplog, tokenizer):
    caplog.set_level("INFO")
    client = make_client(api_key=[KEY])
    headers = {"authorization": f"Bearer {KEY}"}
    await client.post("/v1/completions", json={"prompt": "my secret diary"}, headers=headers)
    tokenizer.encode = None
    await client.post("/v1/completions", json={"prompt": "my secret diary"}, headers=headers)
    await client.get("/v1/models", headers={"authorization": "Bearer wrong-secret"})
    assert "failed" in caplog.text
    assert "secret" not in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("key", ["another", KEY, "wrong"])
async def test_every_key_is_compared_every_time_in_constant_time_and_as_bytes(guarded, monkeypatch, key):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((type(a), len(a))) or compare(a, b))
    await guarded.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert compared == [(bytes, 32)] * 2, "digests, so that the time does not depend on the key's length either"
