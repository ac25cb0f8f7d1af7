"""Calls as JSON objects between two markers: MiniMax's, Hermes' and those like them.

    <tool_calls>                                 <tool_call>
    {"name": "f", "arguments": {...}}            {"name": "f", "arguments": {...}}
    {"name": "g", "arguments": {...}}            </tool_call>
    </tool_calls>

One parser serves both: any number of objects between the markers. Text that is no call is content, as written. Some
models write "parameters" for "arguments".
"""

from __future__ import annotations

import re

from .deltas import CallArguments, CallBegin, Content, Delta, merged
from .json_object import ObjectScanner, parse, parse_string
from .markers import Markers, TrimmedText, skip_spaces
from .reasoning import CLOSE

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ARGUMENTS = ("arguments", "parameters")
MAX_RAW_NAME = 400  # 64 characters, each as \\uXXXX, and quotes


class JsonCalls:
    """Gives a call as soon as its name is known and its arguments have opened, then the arguments as they come."""

    def __init__(self, open_marker: str, close_marker: str) -> None:
        self._open, self._close = open_marker, close_marker
        self._markers = Markers(open_marker)
        self._after_calls = Markers(open_marker, close_marker, CLOSE)
        self._text = ""
        self._position = 0  # the text before it has been read
        self._read = self._read_prose
        self._prose = TrimmedText()
        self._held: list[str] = []  # the text since the opening marker, which becomes content if it is no call
        self._scanner = ObjectScanner()
        self._arguments = ""  # the key of the arguments of the call that has begun
        self._num_calls = 0
        self._has_begun = False  # the call that is being read
        self._has_calls = False  # the section that is being read

    def push(self, text: str) -> list[Delta]:
        self._text, self._position = self._text[self._position :] + text, 0
        deltas: list[Delta] = []
        while self._read(deltas):
            pass
        return merged(deltas)

    def finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        self._show_held(deltas)
        rest, self._text = self._text[self._position :], ""
        if self._has_calls and self._read == self._read_section:
            rest = ""  # perhaps the beginning of a closing marker
        deltas += [Content(self._prose.write(rest)), Content(self._prose.finish())]
        return merged(deltas)

    # One method per state. Each reads on, and returns whether reading can go on without more text.

    def _read_prose(self, deltas: list[Delta]) -> bool:
        # An end without its beginning, after a call, belongs to a call that was written badly, or to the thought that
        # the call has ended.
        markers = self._after_calls if self._num_calls else self._markers
        end, marker = markers.find(self._text, self._position)
        deltas.append(Content(self._prose.write(self._text[self._position : end])))
        self._position = end + len(marker or "")
        if marker == self._open:
            self._held, self._has_calls = [marker], False
            self._read = self._read_section
        elif marker is not None:
            self._prose.meet_marker()
        return marker is not None

    def _read_section(self, deltas: list[Delta]) -> bool:
        self._hold_until(skip_spaces(self._text, self._position))
        rest = self._text[self._position : self._position + len(self._close)]
        if rest == self._close:
            self._hold_until(self._position + len(rest))
            if self._has_calls:
                self._held = []
                self._prose.meet_marker()
        elif self._close.startswith(rest):  # also when there is nothing yet
            return False
        elif rest[0] == "{":
            self._scanner, self._has_begun = ObjectScanner(), False
            self._read = self._read_call
            return True
        self._show_held(deltas)
        self._read = self._read_prose
        return True

    def _read_call(self, deltas: list[Delta]) -> bool:
        end = self._scanner.feed(self._text, self._position)
        if self._has_begun:
            self._position = end
        else:
            self._hold_until(end)
            self._begin_if_known(deltas)
        if self._has_begun:
            deltas.append(CallArguments(self._num_calls - 1, self._scanner.take(self._arguments)))
        if self._scanner.is_open:
            return False
        if not self._has_begun:
            self._show_held(deltas)
        self._read = self._read_section if self._has_begun or self._scanner.is_closed else self._read_prose
        return True

    def _begin_if_known(self, deltas: list[Delta]) -> None:
        raw = self._scanner.member("name") or ""
        name = parse_string(raw) if len(raw) <= MAX_RAW_NAME else None
        if name is None or not NAME.fullmatch(name):
            return
        key = _key_of_object(self._scanner)
        if key is not None:
            self._begin(deltas, name, key)
        elif self._scanner.is_closed:
            key, arguments = _other_arguments(self._scanner)
            if arguments is not None:
                self._begin(deltas, name, key)
                deltas.append(CallArguments(self._num_calls - 1, arguments))
                self._scanner.take(key)

    def _begin(self, deltas: list[Delta], name: str, key: str) -> None:
        self._arguments = key
        deltas.append(CallBegin(self._num_calls, name))
        self._num_calls += 1
        self._has_begun = self._has_calls = True
        self._held = []
        self._prose.meet_marker()

    def _hold_until(self, end: int) -> None:
        self._held.append(self._text[self._position : end])
        self._position = end

    def _show_held(self, deltas: list[Delta]) -> None:
        held, self._held = self._held, []
        deltas.append(Content(self._prose.write("".join(held))))


def _key_of_object(scanner: ObjectScanner) -> str | None:
    """The first key for arguments whose value opens as an object."""
    return next((key for key, first in scanner.starts.items() if key in ARGUMENTS and first == "{"), None)


def _other_arguments(scanner: ObjectScanner) -> tuple[str, str | None]:
    """(key, arguments) if the arguments are left out, null, or JSON text in a string; else None."""
    key = next((key for key in ARGUMENTS if scanner.member(key) not in (None, "null")), ARGUMENTS[0])
    raw = scanner.member(key)
    if raw in (None, "null"):
        return key, "{}"
    text = parse_string(raw or "")
    return key, text if text is not None and isinstance(parse(text), dict) else None
