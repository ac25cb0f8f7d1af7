"""Kimi K2's calls, whose markers are control tokens:

<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{...}<|tool_call_end|>
<|tool_calls_section_end|>
"""

from __future__ import annotations

import re

from .deltas import CallArguments, CallBegin, Content, Delta, merged
from .markers import Markers, TrimmedText, skip_spaces

CALL_BEGIN = "<|tool_call_begin|>"
ARGUMENTS_BEGIN = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
SINGULAR = ("<|tool_call_section_begin|>", "<|tool_call_section_end|>")  # models write these, too
MARKERS = (CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, *SINGULAR)

HEAD = re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[a-zA-Z0-9_-]{1,64})(?P<number>:\d{1,9})?)\s*")
ANY = Markers(*MARKERS)


class KimiCalls:
    """A marker ends the text before it. Text that is no call becomes content, without its markers."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0  # the text before it has been read
        self._read = self._read_prose
        self._prose = TrimmedText()
        self._head: list[str] = []
        self._arguments: TrimmedText | None = None  # of the call that has begun
        self._num_calls = 0

    def push(self, text: str) -> list[Delta]:
        self._text, self._position = self._text[self._position :] + text, 0
        deltas: list[Delta] = []
        while self._read(deltas):
            pass
        return merged(deltas)

    def finish(self) -> list[Delta]:
        rest, self._text = self._text[self._position :], ""
        if self._arguments is not None:
            return merged([CallArguments(self._num_calls - 1, self._arguments.write(rest))])
        shown = self._prose.write("".join((*self._head, rest)))
        return merged([Content(shown), Content(self._prose.finish())])

    # One method per state. Each reads on, and returns whether reading can go on without more text.

    def _read_prose(self, deltas: list[Delta]) -> bool:
        text, marker = self._read_until_marker()
        deltas.append(Content(self._prose.write(text)))
        if marker is None:
            return False
        self._position += len(marker)
        self._prose.meet_marker()
        if marker == CALL_BEGIN:
            self._read = self._read_head
        return True

    def _read_head(self, deltas: list[Delta]) -> bool:
        text, marker = self._read_until_marker()
        self._head.append(text)
        if marker is None:
            return False
        if marker == ARGUMENTS_BEGIN and HEAD.fullmatch("".join(self._head)):
            self._position += len(marker)
            self._read = self._read_opening
        else:
            self._show_head(deltas)
        return True

    def _read_opening(self, deltas: list[Delta]) -> bool:
        """Between the marker and the arguments, which must open as an object."""
        self._position = skip_spaces(self._text, self._position)
        if self._position == len(self._text):
            return False
        head = HEAD.fullmatch("".join(self._head))
        if self._text[self._position] == "{" and head is not None:
            # The model's own id: the template repeats it in the next prompt.
            call_id = head["id"] if head["number"] else None
            deltas.append(CallBegin(self._num_calls, head["name"], call_id))
            self._num_calls += 1
            self._head, self._arguments = [], TrimmedText()
            self._read = self._read_arguments
        else:
            self._show_head(deltas)
        return True

    def _read_arguments(self, deltas: list[Delta]) -> bool:
        text, marker = self._read_until_marker()
        assert self._arguments is not None
        deltas.append(CallArguments(self._num_calls - 1, self._arguments.write(text)))
        if marker is not None:
            self._arguments = None
            self._read = self._read_prose  # it drops the marker, whichever it is
        return marker is not None

    def _read_until_marker(self) -> tuple[str, str | None]:
        end, marker = ANY.find(self._text, self._position)
        text, self._position = self._text[self._position : end], end
        return text, marker

    def _show_head(self, deltas: list[Delta]) -> None:
        head, self._head = self._head, []
        deltas.append(Content(self._prose.write("".join(head))))
        self._read = self._read_prose
