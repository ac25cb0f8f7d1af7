"""The outermost parser of an answer: bounds its calls and keeps control tokens out of its content."""

from __future__ import annotations

from collections.abc import Iterable

from .deltas import CallArguments, CallBegin, Content, Delta, Parser, merged
from .markers import Markers
from .reasoning import Thinking


class AnswerParser:
    """The deltas of `parser`, without `hidden` control tokens in the content and without calls beyond `max_calls`.

    `hidden`: control tokens that reach the parser as text because they may be markers. Those that the parser did not
    consume as markers are removed from the content.
    """

    def __init__(self, parser: Parser, *, hidden: tuple[str, ...] = (), max_calls: int | None = None) -> None:
        self._parser = parser
        self._hidden = Markers(*hidden) if hidden else None
        self._max_calls = max_calls
        self._held = ""  # the end of the content, while it may be the beginning of a control token
        self.num_calls = 0

    @property
    def is_thinking(self) -> bool:
        """Whether a thought is open."""
        return isinstance(self._parser, Thinking) and self._parser.is_open

    @property
    def may_think(self) -> bool:
        """Whether a thought is open or may still come."""
        return isinstance(self._parser, Thinking) and not self._parser.is_over

    def push(self, text: str) -> list[Delta]:
        return self._pass_on(self._parser.push(text))

    def finish(self) -> list[Delta]:
        deltas = self._pass_on(self._parser.finish())
        return merged([*deltas, self._release()])

    def _pass_on(self, deltas: list[Delta]) -> list[Delta]:
        if self._hidden is not None:
            deltas = merged(self._without_hidden(deltas, self._hidden))
        if self._max_calls is not None:
            deltas = [delta for delta in deltas if _is_below(delta, self._max_calls)]
        for delta in deltas:
            self.num_calls += isinstance(delta, CallBegin)
        return deltas

    def _without_hidden(self, deltas: list[Delta], hidden: Markers) -> Iterable[Delta]:
        for delta in deltas:
            if not isinstance(delta, Content):
                yield self._release()
                yield delta
                continue
            text, position = self._held + delta.text, 0
            marker: str | None = ""
            while marker is not None:
                end, marker = hidden.find(text, position)
                yield Content(text[position:end])
                position = end + len(marker or "")
            self._held = text[position:]

    def _release(self) -> Content:
        held, self._held = self._held, ""
        return Content(held)


def _is_below(delta: Delta, max_calls: int) -> bool:
    return not isinstance(delta, CallBegin | CallArguments) or delta.index < max_calls
