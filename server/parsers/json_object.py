"""Reads one JSON object as it comes, so that a member can be passed on before the object is complete."""

from __future__ import annotations

import json
import re

IN_STRING = re.compile(r'[^"\\]+')
PLAIN = re.compile(r"[\s0-9A-Za-z.+-]+")  # white space, numbers, true, false, null
CLOSERS = {"{": "}", "[": "]"}


class ObjectScanner:
    """Fed from the opening brace on, it stops behind the closing brace, or before a character that JSON does not allow.

    It checks nesting, strings and the order of keys and values, but not the spelling of numbers and words. White space
    between the outermost keys and values is dropped. The time is linear in the text, whatever the nesting.
    """

    def __init__(self) -> None:
        self.is_closed = False
        self.is_broken = False
        self.starts: dict[str, str] = {}  # outermost key -> the first character of its value
        self._members: dict[str, str] = {}  # outermost key -> its complete value as written, less the parts taken
        self._closers: list[str] = []
        self._in_string = False
        self._is_escaped = False
        self._key: str | None = None  # the key of the outermost value that is being read; None while a key is read
        self._parts: list[str] = []  # the text of that key or value so far
        self._is_begun = False  # that key or value has a first character
        self._is_whole = False  # and its last, where a quote or bracket tells

    @property
    def is_open(self) -> bool:
        return not (self.is_closed or self.is_broken)

    def feed(self, text: str, position: int) -> int:
        """Read on from `position`; returns where it stopped."""
        while position < len(text) and self.is_open:
            position = self._read_string(text, position) if self._in_string else self._read_plain(text, position)
        return position

    def member(self, key: str) -> str | None:
        """A complete outermost value as written."""
        return self._members.get(key)

    def take(self, key: str) -> str:
        """The text of an outermost value since the last call."""
        if self._key == key:
            parts, self._parts = self._parts, []
            return "".join(parts)
        taken = self._members.get(key, "")
        if taken:
            self._members[key] = ""
        return taken

    def _read_string(self, text: str, position: int) -> int:
        char, end = text[position], position + 1
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
            self._is_whole = len(self._closers) == 1
        elif run := IN_STRING.match(text, position):
            end = run.end()
        self._parts.append(text[position:end])
        return end

    def _read_plain(self, text: str, position: int) -> int:
        run = PLAIN.match(text, position)
        if run is None:
            self.is_broken = not self._read_sign(text[position])
            return position if self.is_broken else position + 1
        if len(self._closers) > 1:
            self._parts.append(run[0])
        elif word := "".join(run[0].split()):
            if self._is_whole:
                self.is_broken = True
                return position + len(run[0]) - len(run[0].lstrip())
            self._keep(word)
        return run.end()

    def _read_sign(self, char: str) -> bool:
        """Whether this character may stand here."""
        if char in ("{", "[", '"'):
            return self._open(char)
        if char in ("}", "]"):
            return self._close(char)
        if char not in (":", ","):
            return False
        if len(self._closers) > 1:
            self._parts.append(char)
            return True
        return self._end_key() if char == ":" else self._end_value()

    def _open(self, char: str) -> bool:
        if len(self._closers) == 1 and self._is_begun:
            return False
        if self._closers:
            self._keep(char)
        if char == '"':
            self._in_string = True
        else:
            self._closers.append(CLOSERS[char])
        return True

    def _close(self, char: str) -> bool:
        if char != self._closers[-1]:
            return False
        if len(self._closers) == 1:
            is_empty = self._key is None and not self._is_begun  # {}, or a comma too many
            self.is_closed = is_empty or self._end_value()
            return self.is_closed
        self._closers.pop()
        self._keep(char)
        self._is_whole = len(self._closers) == 1
        return True

    def _keep(self, part: str) -> None:
        if not self._is_begun and self._key is not None:
            self.starts[self._key] = part[0]
        self._is_begun = True
        self._parts.append(part)

    def _end_key(self) -> bool:
        key = parse_string("".join(self._parts)) if self._key is None else None
        if key is None or key in self._members:
            return False
        self._next_part()
        self._key = key
        return True

    def _end_value(self) -> bool:
        if self._key is None or not self._is_begun:
            return False
        self._members[self._key] = self._next_part()
        self._key = None
        return True

    def _next_part(self) -> str:
        part, self._parts = "".join(self._parts), []
        self._is_begun = self._is_whole = False
        return part


def parse_string(raw: str) -> str | None:
    """The string that `raw` is in JSON; None: it is none."""
    value = parse(raw)
    return value if isinstance(value, str) else None


def parse(raw: str) -> object:
    """The value of a JSON text; None for null and for a text that is no JSON."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
