"""Names of fields that were left out of a request: in a response header and, once each, in the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

logger = logging.getLogger("leyden.server")

IGNORED_HEADER = "x-ignored-parameters"
MAX_IGNORED_NAMES = 32
MAX_IGNORED_CHARS = 160  # a path within a schema is long
MAX_TOLD_NAMES = 100
MAX_HEADER_CHARS = 2_048  # proxies bound a response's headers, some of them at 4,096 characters
INDEX = re.compile(r"\[\d+\]")
UNSAFE_NAME_CHARS = re.compile(r"[^A-Za-z0-9_.$\[\]-]")


def ignored_header(names: list[str]) -> dict[str, str]:
    """The response header that lists the fields left out. Names come from users, so they are cut and cleaned."""
    if not names:
        return {}
    cleaned: list[str] = []
    for name in names[:MAX_IGNORED_NAMES]:
        cleaned.append(UNSAFE_NAME_CHARS.sub("?", name[:MAX_IGNORED_CHARS]))
        if len(", ".join(cleaned)) > MAX_HEADER_CHARS:
            cleaned.pop()
            break
    num_left = len(names) - len(cleaned)
    return {IGNORED_HEADER: ", ".join([*cleaned, f"and {num_left} more"] if num_left else cleaned)}


class IgnoredNames:
    """Warns once of each field that is left out: a header is easily overlooked, and a misspelt field changes no answer.

    Names come from users, so no more than `MAX_TOLD_NAMES` are told and kept.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, names: Iterable[str]) -> None:
        for name in names:
            shown = INDEX.sub("[]", name[:MAX_IGNORED_CHARS])
            if shown not in self._told and len(self._told) < MAX_TOLD_NAMES:
                self._told.add(shown)
                logger.warning("requests send %s, which is left out (told once; header %s)", shown, IGNORED_HEADER)
                if len(self._told) == MAX_TOLD_NAMES:
                    logger.warning("more fields that are left out are named in %s alone", IGNORED_HEADER)
