"""Markers in text that arrives in pieces, and the text beside them."""

from __future__ import annotations

import re

WORD = re.compile(r"\S")


class Markers:
    """Finds the first of a few fixed strings. No marker may be the beginning of another."""

    def __init__(self, *markers: str) -> None:
        self._any = re.compile("|".join(map(re.escape, markers)))
        self._prefixes = frozenset(marker[:n] for marker in markers for n in range(1, len(marker)))
        self._longest = max(map(len, markers)) - 1

    def find(self, text: str, start: int) -> tuple[int, str | None]:
        """(end of the plain text from `start` on, the marker there). None: no marker, or only its beginning."""
        found = self._any.search(text, start)
        if found is not None:
            return found.start(), found[0]
        for length in range(min(self._longest, len(text) - start), 0, -1):
            if text[-length:] in self._prefixes:
                return len(text) - length, None
        return len(text), None


class TrimmedText:
    """Drops the white space next to markers, which is layout. Other white space stays."""

    def __init__(self, *, follows_marker: bool = False) -> None:
        self._follows_marker = follows_marker
        self._spaces: list[str] = []  # held back: the next text decides

    def write(self, text: str) -> str:
        """The text that is safe to show now, held white space included."""
        if self._follows_marker:
            text = text.lstrip()
        body = text.rstrip()
        if not body:
            if text:
                self._spaces.append(text)
            return ""
        shown = "".join((*self._spaces, body))
        self._follows_marker = False
        self._spaces = [text[len(body) :]]
        return shown

    def meet_marker(self) -> None:
        self._spaces = []
        self._follows_marker = True

    def finish(self) -> str:
        spaces, self._spaces = self._spaces, []
        return "".join(spaces)


def skip_spaces(text: str, start: int) -> int:
    """The end of the white space that begins at `start`."""
    found = WORD.search(text, start)
    return len(text) if found is None else found.start()
