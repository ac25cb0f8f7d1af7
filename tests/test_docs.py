"""README and docs name files, sections and sizes that are there."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "(?:server|engine|models|kernels|configs|benchmarks|tests|tools|docs)"
HEART = ("models", "kernels", "engine/scheduling", "engine/execution", "engine/prefix", "engine/startup")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def num_lines(path: Path) -> int:
    """Lines of a file, or of all modules in a folder."""
    files = path.rglob("*.py") if path.is_dir() else [path]
    return sum(len(file.read_text().splitlines()) for file in files)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_within_the_repository_leads_to_a_file_and_its_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_file_that_a_page_names_is_there(page):
    names = re.findall(rf"`({FOLDERS}/[\w./-]*\.(?:py|yaml|md|json)|{FOLDERS}/(?:[\w-]+/)*)`", page.read_text())
    homes = (ROOT, ROOT / "tests")  # reliability.md names tests alone
    assert [name for name in names if not any((home / name).exists() for home in homes)] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_size_that_a_page_gives_for_a_file_is_within_a_tenth(page):
    for name, lines in re.findall(r"`([\w./-]+)`\s+\(([\d,]+) lines", page.read_text()):
        assert int(lines.replace(",", "")) == pytest.approx(num_lines(ROOT / name), rel=0.1), name


def test_the_readme_is_short_and_tells_the_size_of_the_heart():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 250
    told = int(re.search(r"The heart is about ([\d,]+) lines", text)[1].replace(",", ""))
    assert told == pytest.approx(sum(num_lines(ROOT / folder) for folder in HEART), rel=0.05)


def test_the_guide_to_the_architecture_has_lines_of_at_most_120_characters():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_every_room_has_its_line_in_the_guide():
    text = (ROOT / "docs" / "architecture.md").read_text()
    layers = ("kernels", "models", "engine", "server")
    rooms = chain.from_iterable((ROOT / layer).glob("*/__init__.py") for layer in layers)
    assert [room for room in (f"{path.parent.relative_to(ROOT)}/" for path in rooms) if f"`{room}`" not in text] == []
