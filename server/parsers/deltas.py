"""The deltas of an answer, and the protocol of every parser."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the thought."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call number `index` of the answer. `id` is None where the format has none."""

    index: int
    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of the arguments of call `index`, as the model wrote it."""

    index: int
    text: str


Delta = Content | Reasoning | CallBegin | CallArguments


class Parser(Protocol):
    """Reads one answer as it comes. Its merged deltas do not depend on how the text was cut."""

    def push(self, text: str) -> list[Delta]:
        """The deltas that `text` settles. A text that may still become a marker is held back."""
        ...

    def finish(self) -> list[Delta]:
        """The deltas of the held text, once the answer has ended."""
        ...


class PlainText:
    """The parser of an answer without a format: all text is content."""

    def push(self, text: str) -> list[Delta]:
        return [Content(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The deltas with neighbours of one kind joined, and without empty ones."""
    deltas = [delta for delta in deltas if isinstance(delta, CallBegin) or delta.text]
    if len(deltas) < 2:  # nearly every token
        return deltas
    runs: list[tuple[Delta, list[str]]] = []
    for delta in deltas:
        if isinstance(delta, CallBegin):
            runs.append((delta, []))
        elif runs and _continues(runs[-1][0], delta):
            runs[-1][1].append(delta.text)
        else:
            runs.append((delta, [delta.text]))
    return [_with_text(first, texts) for first, texts in runs]


def _continues(first: Delta, delta: Delta) -> bool:
    if isinstance(first, CallArguments) and isinstance(delta, CallArguments):
        return first.index == delta.index
    return type(first) is type(delta) and not isinstance(first, CallBegin)


def _with_text(first: Delta, texts: list[str]) -> Delta:
    match first:
        case CallBegin():
            return first
        case CallArguments():
            return CallArguments(first.index, "".join(texts))
        case Content():
            return Content("".join(texts))
        case Reasoning():
            return Reasoning("".join(texts))
