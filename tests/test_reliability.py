"""docs/reliability.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

from leyden.configs.schema import Settings

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text()


def test_every_test_that_the_document_names_is_there():
    path, found = "", 0
    for file, name in re.findall(r"`([\w/]*\.py)?(?:::(\w+))?`", DOCUMENT):
        path = file or path
        if not path or not (file or name):
            continue
        assert (ROOT / "tests" / path).exists(), path
        if name:
            found += 1
            assert re.search(rf"def {name}\(", (ROOT / "tests" / path).read_text()), f"{path}::{name}"
    assert found > 30


def test_every_bound_that_the_document_names_is_a_setting_with_that_default():
    for names, defaults in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([\d,. ]+) \|", DOCUMENT, re.MULTILINE):
        numbers = [float(number.replace(",", "")) for number in defaults.split(", ")]
        settings = re.findall(r"`(\w+)`", names)
        assert [getattr(Settings(), name) for name in settings] == numbers
