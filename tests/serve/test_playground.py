"""The playground in a real browser, before a real server: `pytest -m slow tests/serve/test_playground.py`.

Needs `pip install playwright` and a Chromium; skipped without them.
"""

from __future__ import annotations

import re
import shutil

import httpx
import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
KEY = "correct-horse"
SIZES = {"desktop": (1200, 860), "phone": (360, 740)}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=SIZES)
def page(request, browser):
    """A page that fails the test when its console says anything but that the server refused a request."""
    width, height = SIZES[request.param]
    opened = browser.new_page(viewport={"width": width, "height": height})
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
    opened.close()
    assert complaints == []


def is_complaint(message) -> bool:
    return message.type != "verbose" and not re.search("server responded with a status of 40[01]", message.text)


def open_sampling(page, **values):
    if not page.locator("#temperature").is_visible():
        page.locator("#sampling summary").click()
    for name, value in values.items():
        page.locator(f"#{name}").fill(value)


def status(page, words):
    playwright.expect(page.locator("#status")).to_have_text(words, timeout=30_000)


def test_a_chat_streams_and_is_measured(page, shared):
    page.goto(f"{shared.url}/playground")
    playwright.expect(page.locator("#served")).to_contain_text("tiny")
    open_sampling(page, max_tokens="200", seed="1")
    page.locator("#prompt").fill("hello")
    page.locator("#send").click()
    playwright.expect(page.locator(".answer .text").nth(1)).not_to_be_empty()
    assert page.locator("#status").inner_text() == "Answering …", "text is shown before the answer is whole"
    status(page, "Ended at max tokens")
    assert page.locator("#tokens").inner_text() == "200"
    assert page.locator("#ttft").inner_text().endswith(" ms") and int(page.locator("#speed").inner_text()) > 0
    playwright.expect(page.locator("#cached")).to_have_text(re.compile(r"^\d+ of \d+$"))
    playwright.expect(page.locator("#slots-text")).to_have_text("0 of 64")
    playwright.expect(page.get_by_label("Snapshots")).to_be_visible()
    playwright.expect(page.locator("#snapshots-text")).to_have_text(re.compile(r"^\d of 4,096$"))
    playwright.expect(page.get_by_label("Drafts accepted")).to_be_hidden()


def test_the_second_answer_is_in_sight(page, shared):
    page.goto(f"{shared.url}/playground")
    open_sampling(page, max_tokens="200")
    for question in ("first\n" * 40, "second"):
        page.locator("#prompt").fill(question)
        page.locator("#send").click()
        status(page, "Ended at max tokens")
    answers, last = page.locator("#answers"), page.locator(".answer").last.locator(".text").last
    assert answers.evaluate("list => list.scrollHeight > 1.5 * list.clientHeight"), "more than can be seen"
    seen, written = answers.bounding_box(), last.bounding_box()
    assert abs((written["y"] + written["height"]) - (seen["y"] + seen["height"])) < 40, "the end of the list is shown"


def test_figures_belong_to_the_answer_shown(page, shared):
    page.goto(f"{shared.url}/playground")
    open_sampling(page, max_tokens="30")
    page.locator("#send").click()
    status(page, "Ended at max tokens")
    assert page.locator("#tokens").inner_text() == "30"
    page.get_by_text("Completion", exact=True).click()
    assert [page.locator(f"#{name}").inner_text() for name in ("ttft", "speed", "tokens", "cached")] == ["–"] * 4


def test_stop_aborts_on_the_server_too(page, shared):
    page.goto(f"{shared.url}/playground")
    page.get_by_text("Completion", exact=True).click()
    open_sampling(page, max_tokens="900")
    page.locator("#prompt").fill("a")
    page.locator("#send").click()
    playwright.expect(page.locator("#slots-text")).to_have_text("1 of 64")
    page.locator("#stop").click()
    status(page, "Stopped")
    shared.wait_idle()
    assert page.locator("#alert").is_hidden()


def test_a_conversation_cleared_in_the_middle_of_an_answer_begins_anew(page, shared):
    page.goto(f"{shared.url}/playground")
    open_sampling(page, max_tokens="900")
    page.locator("#prompt").fill("first")
    page.locator("#send").click()
    playwright.expect(page.locator(".answer .text").nth(1)).not_to_be_empty()
    page.locator("#clear").click()
    playwright.expect(page.locator("#send")).to_be_enabled()
    page.locator("#max_tokens").fill("5")
    page.locator("#prompt").fill("second")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.locator("#send").click()
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "second"}]
    status(page, "Ended at max tokens")


@pytest.mark.parametrize("mode", ["Chat", "Completion"])
def test_the_heat_map_shows_alternatives_to_mouse_and_keyboard(page, shared, mode):
    page.goto(f"{shared.url}/playground")
    page.get_by_text(mode, exact=True).click()
    open_sampling(page, max_tokens="20")
    page.locator("#heat").check()
    page.locator("#prompt").fill("hello")
    page.locator("#send").click()
    status(page, "Ended at max tokens")
    tokens, alternatives = page.locator(".heat .token"), page.locator(".alternative")
    assert tokens.count() == 20
    assert page.locator("#legend .token").all_inner_texts() == [
        "≥ 90 %",
        "≥ 70 %",
        "≥ 50 %",
        "≥ 30 %",
        "≥ 10 %",
        "≥ 3 %",
        "less",
    ]
    playwright.expect(page.locator("#legend")).to_be_visible()
    tokens.nth(3).hover()
    assert 5 <= alternatives.count() <= 6
    tokens.first.focus()
    first = page.locator("#alternatives").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    assert page.locator(".shown").count() == 1 and page.locator("#alternatives").inner_text() != first


def test_a_refusal_is_shown_as_the_server_words_it(page, shared):
    page.goto(f"{shared.url}/playground")
    open_sampling(page, max_tokens="5000")
    page.locator("#send").click()
    status(page, "Failed")
    playwright.expect(page.locator("#alert")).to_contain_text("400: ")


def test_a_key_opens_a_guarded_server_and_is_kept_nowhere(page, serve):
    page.goto(f"{serve('--api-key', KEY).url}/playground")
    playwright.expect(page.locator("#served")).to_contain_text("401")
    page.get_by_text("API key", exact=True).click()
    page.locator("#key").fill(KEY)
    page.locator("#key").press("Enter")
    playwright.expect(page.locator("#served")).to_contain_text("tiny")
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    page.reload()
    playwright.expect(page.locator("#served")).to_contain_text("401")


def test_the_reference_lists_every_route(page, shared):
    page.goto(f"{shared.url}/docs")
    playwright.expect(page.locator(".route").first).to_be_visible()
    paths = httpx.get(f"{shared.url}/openapi.json").json()["paths"]
    assert page.locator(".route").count() == sum(len(methods) for methods in paths.values())
    assert page.locator("th code", has_text="temperature").count() == 3, "completions, chat and responses take it"
    hidden = "tables => tables.filter(table => table.scrollWidth > table.parentElement.clientWidth).length"
    assert page.locator("table").evaluate_all(hidden) == 0, "no column is hidden sideways"
