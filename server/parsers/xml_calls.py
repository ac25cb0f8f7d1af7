"""Qwen3-Coder's calls, also those of Qwen3.5 and later: parameters between tags, their values as plain text.

    <tool_call>
    <function=f>
    <parameter=path>
    a.txt
    </parameter>
    </function>
    </tool_call>

Some answers leave <tool_call> out, or the end of a parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ...engine.text.json_schema import as_kind
from .argument_types import STRING, as_json, types_of
from .deltas import CallArguments, CallBegin, Content, Delta, merged
from .markers import Markers, TrimmedText, skip_spaces
from .reasoning import CLOSE

CALL, END_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
MARKERS = (CALL, END_CALL)  # those that may be control tokens
OPENING = (CALL, FUNCTION)  # of a call, with white space between

IN_PROSE = Markers(CALL, FUNCTION)
IN_PROSE_AFTER_CALLS = Markers(CALL, FUNCTION, END_CALL, END_FUNCTION, CLOSE)
IN_CALL = Markers(CALL, END_CALL, FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER)
IN_VALUE = Markers(END_PARAMETER, PARAMETER, END_FUNCTION)

HEAD = re.compile(r"\s{0,16}(?P<name>[a-zA-Z0-9_-]{1,64})\s{0,16}>")
HEAD_SO_FAR = re.compile(r"\s{0,16}[a-zA-Z0-9_-]{0,64}\s{0,16}")
KEY_END = re.compile(r"[>\n]")
MAX_KEY = 256  # characters


class XmlCalls:
    """Gives a call once its name is known, then its arguments as JSON: strings as they come, other values as a whole.

    A value's type is that of the function's schema; without one it is a string. Text that is no call is content.
    """

    def __init__(self, schemas: Mapping[str, dict[str, Any]]) -> None:
        """`schemas`: name of a function -> the JSON schema of its arguments."""
        self._schemas = schemas
        self._text = ""
        self._position = 0  # the text before it has been read
        self._read = self._read_prose
        self._prose = TrimmedText()
        self._held: list[str] = []  # markers and spaces that become content if no call follows
        self._is_in_section = False  # a <tool_call> with a call has not been closed
        self._schema: dict[str, Any] = {}  # of the call that is being read
        self._value = _Value(STRING)
        self._num_parameters = 0
        self._num_calls = 0

    def push(self, text: str) -> list[Delta]:
        self._text, self._position = self._text[self._position :] + text, 0
        deltas: list[Delta] = []
        while self._read(deltas):
            pass
        return merged(deltas)

    def finish(self) -> list[Delta]:
        """A call that was cut off stays incomplete."""
        rest, self._text = self._text[self._position :], ""
        is_marker = self._is_in_section and END_CALL.startswith(rest)
        if self._read not in (self._read_prose, self._read_section, self._read_head) or is_marker:
            rest = ""
        shown = self._prose.write("".join((*self._held, rest)))
        return merged([Content(shown), Content(self._prose.finish())])

    # One method per state. Each reads on, and returns whether reading can go on without more text.

    def _read_prose(self, deltas: list[Delta]) -> bool:
        # An end without its beginning, after a call, belongs to a call that was written badly, or to the thought that
        # the call has ended.
        marker = self._read_until(IN_PROSE_AFTER_CALLS if self._num_calls else IN_PROSE, deltas)
        if marker in OPENING:
            self._held.append(marker)
            self._read = self._read_section if marker == CALL else self._read_head
        elif marker is not None:
            self._prose.meet_marker()
            self._is_in_section = self._is_in_section and marker != END_CALL
        return marker is not None

    def _read_section(self, deltas: list[Delta]) -> bool:
        """Between <tool_call> and <function=."""
        self._hold_until(skip_spaces(self._text, self._position))
        rest = self._text[self._position : self._position + len(FUNCTION)]
        if rest == FUNCTION:
            self._hold_until(self._position + len(FUNCTION))
            self._read = self._read_head
        elif FUNCTION.startswith(rest):  # also when there is nothing yet
            return False
        else:
            self._show_held(deltas)
        return True

    def _read_head(self, deltas: list[Delta]) -> bool:
        """The function's name, up to ">"."""
        head = HEAD.match(self._text, self._position)
        if head is None:
            if HEAD_SO_FAR.fullmatch(self._text, self._position):
                return False
            self._show_held(deltas)
            return True
        deltas.append(CallBegin(self._num_calls, head["name"]))
        self._position = head.end()
        self._num_calls, self._num_parameters = self._num_calls + 1, 0
        self._schema = self._schemas.get(head["name"], {})
        self._is_in_section = CALL in self._held
        self._held = []
        self._prose.meet_marker()
        self._read = self._read_call
        return True

    def _read_call(self, deltas: list[Delta]) -> bool:
        """Between parameters. Other text there is content."""
        marker = self._read_until(IN_CALL, deltas)
        if marker is None:
            return False
        self._prose.meet_marker()
        if marker == PARAMETER:
            self._read = self._read_key
        elif marker != END_PARAMETER:
            self._give(deltas, "}" if self._num_parameters else "{}")
            self._read = self._read_prose
            if marker in OPENING:
                self._position -= len(marker)
            self._is_in_section = self._is_in_section and marker == END_FUNCTION
        return True

    def _read_key(self, deltas: list[Delta]) -> bool:
        """A parameter's name, up to ">" or the end of the line."""
        end = KEY_END.search(self._text, self._position, self._position + MAX_KEY)
        if end is None:
            if len(self._text) - self._position < MAX_KEY:
                return False
            deltas.append(Content(self._prose.write(PARAMETER)))
            self._read = self._read_call
            return True
        key = self._text[self._position : end.start()].strip()
        self._value = _Value(types_of(as_kind(dict, self._schema.get("properties")).get(key), self._schema))
        self._give(deltas, ", " if self._num_parameters else "{")
        self._give(deltas, json.dumps(key, ensure_ascii=False) + ": " + self._value.begin())
        self._position = end.end()
        self._num_parameters += 1
        self._read = self._read_value
        return True

    def _read_value(self, deltas: list[Delta]) -> bool:
        end, marker = IN_VALUE.find(self._text, self._position)
        self._give(deltas, self._value.write(self._text[self._position : end]))
        self._position = end + (len(END_PARAMETER) if marker == END_PARAMETER else 0)
        if marker is not None:
            self._give(deltas, self._value.finish())
            self._read = self._read_call
        return marker is not None

    def _give(self, deltas: list[Delta], arguments: str) -> None:
        deltas.append(CallArguments(self._num_calls - 1, arguments))

    def _read_until(self, markers: Markers, deltas: list[Delta]) -> str | None:
        """Give the text before the next marker as content, and read that marker."""
        end, marker = markers.find(self._text, self._position)
        deltas.append(Content(self._prose.write(self._text[self._position : end])))
        self._position = end + len(marker or "")
        return marker

    def _hold_until(self, end: int) -> None:
        self._held.append(self._text[self._position : end])
        self._position = end

    def _show_held(self, deltas: list[Delta]) -> None:
        held, self._held = self._held, []
        deltas.append(Content(self._prose.write("".join(held))))
        self._read = self._read_prose


class _Value:
    """A value's text -> JSON. One line break at each end is layout. A string is written as it comes."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
        self._is_string = types == STRING
        self._parts: list[str] = []  # of a value that is no string
        self._has_begun = False
        self._line_break = ""  # held back: it may be the value's last character

    def begin(self) -> str:
        return '"' if self._is_string else ""

    def write(self, text: str) -> str:
        if not text:
            return ""
        if not self._has_begun:
            self._has_begun = True
            text = text.removeprefix("\n")
        text = self._line_break + text
        self._line_break = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if self._is_string:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        self._parts.append(text)
        return ""

    def finish(self) -> str:
        return '"' if self._is_string else as_json("".join(self._parts), self._types)
