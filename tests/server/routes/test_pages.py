"""The playground and the reference as HTTP serves them; `tests/serve/test_playground.py` drives them in a browser."""

from __future__ import annotations

import re

import pytest
from leyden.server.pages import FILES, FOLDER, ROOT_PATH

KEY = "correct-horse"


@pytest.mark.parametrize("path", FILES)
async def test_a_page_comes_with_the_strict_policy(client, path):
    response = await client.get(path)
    assert response.status_code == 200
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
        "form-action": "'none'",
    }
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-type"].split(";")[0] in ("text/html", "text/css", "text/javascript")
    assert (await client.head(path)).status_code == 200


def test_every_static_file_is_served_and_none_is_missing():
    assert set(FILES.values()) == {path.name for path in FOLDER.iterdir()}


def test_playground_has_every_element_its_script_fills_and_a_label_for_every_meter():
    page, script = (FOLDER / "playground.html").read_text(), (FOLDER / "playground.js").read_text()
    there = set(re.findall(r'\sid="([\w-]+)"', page))
    gauges = set(re.findall(r'\bgauge\("(\w+)"', script))
    assert set(re.findall(r'\bat\("([\w-]+)"\)', script)) | gauges | {f"{name}-text" for name in gauges} <= there
    meters = re.findall(r'<meter id="(\w+)"', page)
    assert gauges == set(meters) <= set(re.findall(r'<label [^>]*for="(\w+)"', page))


async def test_the_playground_shows_numbers_that_the_server_tells(client, complete):
    script = (FOLDER / "playground.js").read_text()
    load = (await client.get("/load")).json()
    assert set(re.findall(r"\bload\.(\w+)", script)) <= set(load)
    usage = (await complete()).json()["usage"]
    for path in re.findall(r"\busage\??\.([\w.]+)", script):
        value = usage
        for name in path.split("."):
            value = value[name]


@pytest.mark.parametrize("name", FILES.values())
def test_pages_hold_no_inline_code_and_need_nothing_from_elsewhere(name):
    text = (FOLDER / name).read_text()
    addresses = set(re.findall(r"https?://[^\s'\"]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|\beval\(|innerHTML|Function\(", text)


async def test_pages_need_no_key_for_a_browser_cannot_send_one_before_it_has_them(make_client):
    guarded = make_client(api_key=[KEY])
    for path in FILES:
        assert (await guarded.get(path)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/load",
        "/server_info",
        "/get_model_info",
        "/openapi.json",
        "/static",
        "/static/",
        "/static/../load",
        "/playground/",
        "//playground",
        "/docs/../v1/models",
        "/static/style.css/",
        "/static/app.py",
    ],
)
async def test_routes_that_the_pages_call_and_other_spellings_need_a_key(make_client, error_of, path):
    error_of(
        await make_client(api_key=[KEY]).get(f"http://localhost{path}"), 401
    )  # whole: "//playground" alone names a host


@pytest.mark.parametrize(
    "path", ["/static/../pages.py", "/static/%2e%2e/pages.py", "/static/..%2fpages.py", "/static/x"]
)
async def test_no_path_leads_to_another_file(client, error_of, path):
    error_of(await client.get(path), 404)


@pytest.mark.parametrize(("path", "name"), FILES.items())
async def test_a_page_is_its_file_for_everyone(make_client, path, name):
    content = (FOLDER / name).read_bytes()
    assert (await make_client().get(path)).content == content
    assert (await make_client(api_key=[KEY], served_model_name="x").get(path)).content == content


BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.mark.parametrize("settings", [{}, {"api_key": [KEY]}], ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_browser_that_opens_the_address_comes_to_the_playground_key_or_not(make_client, settings, method):
    response = await make_client(**settings).request(method, "/", headers=BROWSER)
    assert (response.status_code, response.headers["vary"]) == (307, "Accept")
    assert str(response.next_request.url) == "http://localhost/playground"


@pytest.mark.parametrize("headers", [{}, {"accept": "*/*"}, {"accept": "application/json"}], ids=str)
async def test_a_program_that_asks_for_the_root_gets_the_error_of_any_unknown_path(client, error_of, headers):
    error = error_of(await client.get("/", headers=headers), 404)
    assert error == error_of(await client.get("/nowhere", headers=headers), 404)


async def test_pages_are_no_part_of_the_api(client):
    assert not {ROOT_PATH, *FILES} & set((await client.get("/openapi.json")).json()["paths"])
