"""The text of a custom tool's call, decoded as it comes: the model writes its arguments as {"input": "..."}."""

from __future__ import annotations

import json
import re

from .json_object import parse

INPUT = "input"
OPENING = re.compile(rf'\s*\{{\s*"{INPUT}"\s*:\s*"')
MAX_OPENING = 64  # characters; arguments without the opening by then are read once they are complete
# Escapes that are complete: the first half of a surrogate pair waits until it is known whether the second one follows.
COMPLETE_ESCAPE = (
    r"\\u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}"
    r"|\\u[dD][89abAB][\da-fA-F]{2}(?!\\?\Z|\\u[\da-fA-F]{0,3}\Z)"
    r"|\\u(?![dD][89abAB])[\da-fA-F]{4}"
    r"|\\u(?![\da-fA-F]{4}|[\da-fA-F]{0,3}\Z)"
    r"|\\[^u]"
)
COMPLETE = re.compile(rf'(?:[^"\\]+|{COMPLETE_ESCAPE})*', re.DOTALL)
ESCAPES = re.compile(r"(?:\\u[\da-fA-F]{4})+|\\.", re.DOTALL)


class CustomInput:
    """Decodes the string in {"input": "..."} piece by piece. `finish` returns arguments of another form as written."""

    def __init__(self) -> None:
        self._held = ""
        self._others: list[str] = []  # arguments of another form
        self._has_begun = self._is_over = False

    def push(self, text: str) -> str:
        """The text that `text` completes; half an escape is held back."""
        if self._is_over:
            return ""
        if self._others:
            self._others.append(text)
            return ""
        self._held += text
        if not self._has_begun and not self._open():
            return ""
        complete = COMPLETE.match(self._held)
        assert complete is not None
        self._held = self._held[complete.end() :]
        self._is_over = self._held.startswith('"')
        return ESCAPES.sub(_decoded, complete[0])

    def finish(self) -> str:
        """The text of arguments of another form, else nothing; half an escape is dropped."""
        if self._has_begun:
            return ""
        written = "".join([*self._others, self._held])
        value = parse(written)
        text = value.get(INPUT) if isinstance(value, dict) else None
        return _without_surrogates(text) if isinstance(text, str) else written

    def _open(self) -> bool:
        opening = OPENING.match(self._held)
        if opening is not None:
            self._held, self._has_begun = self._held[opening.end() :], True
        elif len(self._held) > MAX_OPENING:
            self._others, self._held = [self._held], ""
        return self._has_begun


def _decoded(escapes: re.Match[str]) -> str:
    """The characters of JSON escapes; an unknown escape stays as written."""
    try:
        return _without_surrogates(json.loads(f'"{escapes[0]}"'))
    except ValueError:
        return escapes[0]


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
