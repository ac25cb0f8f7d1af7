"""The planned stories: whatever a request names is told, by sentences that are well formed, and no two are alike."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "demo_stories.py"
NUM_STORIES = 6000
SHE, HE = {"she", "her", "herself"}, {"he", "him", "his", "himself"}


@pytest.fixture(scope="module")
def stories() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("demo_stories", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def told(stories: ModuleType) -> list[tuple[Any, str, str]]:
    """Plans, each with a request for it and its story."""
    rng, result = random.Random(7), []
    for _ in range(NUM_STORIES):
        plan = stories.draw_plan(rng)
        request, names_theme = stories.ask(plan, rng)
        result.append((plan, request, stories.tell(plan, rng, names_theme)))
    return result


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_every_plot_has_hero_places_and_a_known_theme(stories: ModuleType) -> None:
    events = [plot.event for plot in stories.plots() if plot.sort == "="]
    assert len(events) == len(set(events)) >= 30
    for plot in stories.plots():
        assert len(plot.beats) >= 5 and "{H}" in plot.text and "{at}" in plot.text, plot.event
        assert plot.themes and all(theme in stories.words() for theme in plot.themes), plot.event
        known = stories.words()["adjectives"] + stories.words()["colors"]
        assert {*plot.adjectives, *plot.unfit} <= {*known}, plot.event


def test_plots_leave_pronouns_to_the_slots(stories: ModuleType) -> None:
    for plot in stories.plots():
        assert not (SHE | HE) & set(words(re.sub(r"\{[^}]*\}", "", plot.text))), plot.event


def test_every_plot_is_told(stories: ModuleType, told: list[tuple[Any, str, str]]) -> None:
    assert {plan.plot.text for plan, _, _ in told} == {plot.text for plot in stories.plots()}


def test_no_slot_and_no_choice_is_left_open(told: list[tuple[Any, str, str]]) -> None:
    for _, request, story in told:
        assert not re.search(r"[\[\]{}|/*#_]|None|  | [.,!?]", request + story), (request, story)


def test_story_has_what_its_plan_and_so_its_request_names(told: list[tuple[Any, str, str]]) -> None:
    for plan, request, story in told:
        for figure in (plan.hero, plan.friend):
            assert figure.mention.removeprefix("the ") in story and f" {figure.kind}" in story, (request, story)
        assert f"{plan.hero.adjectives} {plan.hero.kind}".strip() in story
        for thing in (plan.place, plan.object and plan.object.split(" ", 1)[1]):
            assert not thing or thing.lower() in story.lower(), (request, story)


def test_event_of_the_request_happens_in_the_story(told: list[tuple[Any, str, str]]) -> None:
    small = {"a", "an", "the", "to", "of", "is", "in", "for", "on"}
    for plan, request, story in told:
        stems = {word[:3] for word in words(story)}
        _, *rest = words(plan.plot.event) or [""]
        missing = [word for word in rest if word not in small and word[:3] not in stems]
        assert len(missing) <= 1, (missing, request, story)


def test_hero_stays_he_or_she(told: list[tuple[Any, str, str]]) -> None:
    for plan, request, story in told:
        if plan.hero.pronouns == plan.friend.pronouns:
            other = HE if plan.hero.pronouns[0] == "she" else SHE
            assert not other & set(words(story)), (request, story)


def test_article_agrees_with_the_next_word(told: list[tuple[Any, str, str]]) -> None:
    for _, request, story in told:
        text = request + " " + story
        assert not re.search(r"\b[Aa] (?:[aeio]|um|ug|ho(?:nest|ur))(?!ne\b)", text), text
        assert not re.search(r"\b[Aa]n (?![aeiou]|honest|hour)|\b[Aa]n uni", text), text


def test_sentences_begin_with_a_capital_letter(told: list[tuple[Any, str, str]]) -> None:
    verb = r"(?:said|asked|cr|call|wonder|thought|heard|whisper|want|scream|mutter|told)"
    speech = r"(?:an?|the|he|she|it|somebody|everybody|they|people)(?: \w+){0,3} " + verb
    for _, request, story in told:
        assert not re.search(r'(?:^|[.!?] |\." |\n)"?[a-z]', story), (request, story)
        for after in re.findall(r'[?!]" ([a-z].{0,60})', story):
            assert re.match(rf"{verb}|{speech}", after), (after, story)


def test_speech_opens_and_closes(told: list[tuple[Any, str, str]]) -> None:
    for _, request, story in told:
        assert all(paragraph.count('"') % 2 == 0 for paragraph in story.split("\n\n")), (request, story)


def test_stories_are_short(told: list[tuple[Any, str, str]]) -> None:
    lengths = sorted(len(story.split()) for _, _, story in told)
    assert lengths[0] >= 60 and lengths[len(lengths) // 2] <= 190 and lengths[-1] <= 260


def test_no_two_stories_are_alike(told: list[tuple[Any, str, str]]) -> None:
    assert len({story for _, _, story in told}) == NUM_STORIES


def test_a_seed_always_draws_the_same_rows(stories: ModuleType) -> None:
    rows = stories.draw_rows(20, "held out")
    assert rows == stories.draw_rows(20, "held out") != stories.draw_rows(20, 1)
