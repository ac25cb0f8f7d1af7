"""The thought before an answer, `<think>...</think>`. Another parser reads the answer.

The model writes the opening marker, or the chat template has put it at the end of the prompt. With some formats a call
ends the thought, too: models call from within a thought, and forget to close it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto

from .deltas import Delta, Parser, Reasoning, merged
from .markers import Markers, TrimmedText

OPEN, CLOSE = "<think>", "</think>"
# With more white space than this before its first word an answer does not begin with a thought, nor does a call go on.
MAX_SPACES = 64


class Section(Enum):
    MARKER = auto()  # with the white space around it
    THOUGHT = auto()
    ANSWER = auto()


Pieces = list[tuple[Section, str]]


class Sections:
    """Splits text that comes in pieces into a thought and an answer. Without an opening marker there is no thought.

    The pieces returned join to the text pushed, and their sections do not depend on how the text was cut.
    """

    def __init__(self, *, has_begun: bool, call: tuple[str, ...] = ()) -> None:
        """`has_begun`: the prompt ends in an open thought. `call`: the texts, with white space between them, that begin
        a call and so the answer."""
        self._has_begun = has_begun
        self._call = call
        self._ends = Markers(CLOSE, *call[:1])
        self._text = ""
        self._read = self._read_opening

    @property
    def is_open(self) -> bool:
        """Whether the next text belongs to the thought, its closing marker included."""
        is_opening = self._has_begun and self._read == self._read_opening
        return is_opening or self._read in (self._read_thought, self._read_call)

    @property
    def is_over(self) -> bool:
        """Whether the next text belongs to the answer, white space included."""
        return self._read == self._read_answer

    def push(self, text: str) -> Pieces:
        """The pieces that `text` settles. A text that may still become a marker is held back."""
        self._text += text
        pieces: Pieces = []
        while self._read(pieces):
            pass
        return pieces

    def finish(self) -> Pieces:
        """The held text, once the answer has ended."""
        return [(Section.THOUGHT if self.is_open else Section.ANSWER, self._take(len(self._text)))]

    # One method per state. Each reads on, and returns whether reading can go on without more text.

    def _read_opening(self, pieces: Pieces) -> bool:
        word = self._text.lstrip()
        num_spaces = len(self._text) - len(word)
        if num_spaces <= MAX_SPACES and OPEN.startswith(word[: len(OPEN)]):
            if len(word) < len(OPEN):
                return False
            pieces.append((Section.MARKER, self._take(num_spaces + len(OPEN))))
            self._read = self._read_thought
        else:
            self._read = self._read_thought if self._has_begun else self._read_answer
        return True

    def _read_thought(self, pieces: Pieces) -> bool:
        end, marker = self._ends.find(self._text, 0)
        pieces.append((Section.THOUGHT, self._take(end)))
        if marker == CLOSE:
            pieces.append((Section.MARKER, self._take(len(marker))))
            self._read = self._read_gap
        elif marker is not None:
            self._read = self._read_call
        return marker is not None

    def _read_call(self, pieces: Pieces) -> bool:
        """From what may be the beginning of a call on."""
        begins = _begins_with(self._text, self._call)
        if begins is None:
            return False
        if begins:
            self._read = self._read_answer
        else:
            pieces.append((Section.THOUGHT, self._take(len(self._call[0]))))
            self._read = self._read_thought
        return True

    def _read_gap(self, pieces: Pieces) -> bool:
        """Between the thought and the answer. Some models close a thought twice."""
        pieces.append((Section.MARKER, self._take(len(self._text) - len(self._text.lstrip()))))
        if self._text.startswith(CLOSE):
            pieces.append((Section.MARKER, self._take(len(CLOSE))))
        elif CLOSE.startswith(self._text):  # also when there is nothing yet
            return False
        else:
            self._read = self._read_answer
        return True

    def _read_answer(self, pieces: Pieces) -> bool:
        pieces.append((Section.ANSWER, self._take(len(self._text))))
        return False

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken


class Thinking:
    """Gives the thought as `Reasoning`, and the answer to its parser. White space at markers is dropped."""

    def __init__(self, answer: Parser, *, has_begun: bool, call: tuple[str, ...] = ()) -> None:
        """`has_begun`, `call`: see `Sections`."""
        self._answer = answer
        self._sections = Sections(has_begun=has_begun, call=call)
        self._thought = TrimmedText(follows_marker=True)

    @property
    def is_open(self) -> bool:
        """Whether the next text belongs to the thought, its closing marker included."""
        return self._sections.is_open

    @property
    def is_over(self) -> bool:
        """Whether no thought can come any more."""
        return self._sections.is_over

    def push(self, text: str) -> list[Delta]:
        return merged(self._read(self._sections.push(text)))

    def finish(self) -> list[Delta]:
        rest = self._read(self._sections.finish())
        return merged([*rest, Reasoning(self._thought.finish())] if self.is_open else [*rest, *self._answer.finish()])

    def _read(self, pieces: Pieces) -> Iterable[Delta]:
        for section, text in pieces:
            if section is Section.THOUGHT:
                yield Reasoning(self._thought.write(text))
            elif section is Section.ANSWER:
                yield from self._answer.push(text)


class AfterThought:
    """The scope of stop strings in an answer that may think first (a `StopScope` of the detokenizer)."""

    def __init__(self, *, has_begun: bool, call: tuple[str, ...] = ()) -> None:
        """`has_begun`, `call`: see `Sections`."""
        self._sections = Sections(has_begun=has_begun, call=call)

    def push(self, text: str) -> tuple[str, str]:
        return _split(self._sections.push(text))

    def finish(self) -> tuple[str, str]:
        return _split(self._sections.finish())


def _begins_with(text: str, parts: tuple[str, ...]) -> bool | None:
    """Whether `text` begins with `parts` and at most MAX_SPACES of white space between two; None: more text decides."""
    for number, part in enumerate(parts):
        word = text.lstrip() if number else text
        if len(text) - len(word) > MAX_SPACES or not part.startswith(word[: len(part)]):
            return False
        if len(word) < len(part):
            return None
        text = word[len(part) :]
    return True


def _split(pieces: Pieces) -> tuple[str, str]:
    """(thought and markers, answer)."""
    before = "".join(text for section, text in pieces if section is not Section.ANSWER)
    return before, "".join(text for section, text in pieces if section is Section.ANSWER)
