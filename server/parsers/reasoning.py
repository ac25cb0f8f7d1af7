"""What a model thinks first: `<think>...</think>`, then the answer, which another parser reads.

The opening marker may be the model's, or be in the prompt already, where the chat template put it.
"""

from __future__ import annotations

from .deltas import Delta, Parser, Reasoning, merged
from .markers import Markers, TrimmedText

OPEN, CLOSE = "<think>", "</think>"
CLOSING = Markers(CLOSE)
# An answer with more white space than this before its first word does not begin with a thought.
MAX_SPACES = 64


class Thinking:
    """Splits the thought off; the white space around it is layout. An answer that begins otherwise has none."""

    def __init__(self, answer: Parser, *, has_begun: bool) -> None:
        """`has_begun`: the prompt ends in an open thought."""
        self._answer = answer
        self._has_begun = has_begun
        self._text = ""
        self._read = self._read_opening
        self._thought = TrimmedText(follows_marker=True)

    @property
    def is_open(self) -> bool:
        """Whether what comes next belongs to the thought, its closing marker too."""
        return self._read == self._read_thought or (self._has_begun and self._read == self._read_opening)

    def push(self, text: str) -> list[Delta]:
        self._text += text
        deltas: list[Delta] = []
        while self._read(deltas):
            pass
        return merged(deltas)

    def finish(self) -> list[Delta]:
        text, self._text = self._text, ""
        if self.is_open:
            return merged([Reasoning(self._thought.write(text)), Reasoning(self._thought.finish())])
        return merged([*self._answer.push(text), *self._answer.finish()])

    # Each reads on in its state, and returns whether it can go on without more text.

    def _read_opening(self, deltas: list[Delta]) -> bool:
        word = self._text.lstrip()
        num_spaces = len(self._text) - len(word)
        if num_spaces <= MAX_SPACES and OPEN.startswith(word[: len(OPEN)]):
            if len(word) < len(OPEN):
                return False
            self._text = word[len(OPEN) :]
            self._read = self._read_thought
        else:
            self._read = self._read_thought if self._has_begun else self._read_answer
        return True

    def _read_thought(self, deltas: list[Delta]) -> bool:
        end, marker = CLOSING.find(self._text, 0)
        deltas.append(Reasoning(self._thought.write(self._text[:end])))
        self._text = self._text[end + len(marker or "") :]
        if marker is not None:
            self._read = self._read_gap
        return marker is not None

    def _read_gap(self, deltas: list[Delta]) -> bool:
        self._text = self._text.lstrip()
        if not self._text:
            return False
        self._read = self._read_answer
        return True

    def _read_answer(self, deltas: list[Delta]) -> bool:
        text, self._text = self._text, ""
        deltas += self._answer.push(text)
        return False
