"""Log-probabilities in the two shapes of the API. A token has the same float in all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from ...engine.outputs import TokenLogprobs
from ..wire.answers import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from ..wire.token_names import TokenNames
from .pieces import Splicer, joined, joined_entries

TOKENS_AT_ONCE = 64  # per call that writes log-probabilities
LOWEST_LOGPROB = -9999.0  # JSON has no -inf; vLLM's stand-in

E = TypeVar("E")


class CompletionLogprobsWriter:
    """The logprobs of one choice, piece by piece; `text_offset` keeps running from 0.

    As with vLLM an offset is an index into the joined `tokens`. They join to the text itself, unless one of them is a
    control token or part of a character.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0

    def write(self, entries: Sequence[TokenLogprobs | None], first_token_id: int | None = None) -> CompletionLogprobs:
        """`entries` in order; None stands for the first token of a prompt, whose id is `first_token_id`."""
        out = CompletionLogprobs([], [], [], [])
        for entry in entries:
            token_id = first_token_id if entry is None else entry.token_id
            assert token_id is not None, "an entry without logprobs needs the id of the prompt's first token"
            token = self._names.at_start(token_id) if entry is None else self._names[token_id]
            out.tokens.append(token)
            out.token_logprobs.append(None if entry is None else _finite(entry.logprob))
            out.top_logprobs.append(None if entry is None else self._top(entry))
            out.text_offset.append(self._offset)
            self._offset += len(token)
        return out

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The alternatives by name, most likely first. Of two tokens with one name the likelier keeps the key."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top or [(entry.token_id, entry.logprob)]:
            top.setdefault(self._names[token_id], _finite(logprob))
        return top


def splice_completion_logprobs(
    splicer: Splicer,
    writer: CompletionLogprobsWriter,
    entries: Sequence[TokenLogprobs | None],
    first_token_id: int | None,
) -> CompletionLogprobs:
    """A stand-in for `writer.write(entries)`, whose JSON is written here, TOKENS_AT_ONCE entries at a time."""
    if not entries:
        return writer.write(entries)
    stand_in = CompletionLogprobs([splicer.secret], [], [], [])
    splicer.add(stand_in, joined(writer.write(part, first_token_id) for part in batched(entries)))
    return stand_in


def splice_chat_logprobs(
    splicer: Splicer, entries: Sequence[TokenLogprobs], num_top: int, names: TokenNames
) -> ChatLogprobs:
    """A stand-in for `chat_logprobs(entries)`, whose JSON is written here, TOKENS_AT_ONCE entries at a time."""
    if not entries:
        return ChatLogprobs([])
    stand_in = ChatTokenLogprob(splicer.secret, 0.0, [], [])
    splicer.add(stand_in, joined_entries(chat_logprobs(part, num_top, names).content for part in batched(entries)))
    return ChatLogprobs([stand_in])


def batched(entries: Sequence[E]) -> Iterator[Sequence[E]]:
    return (entries[i : i + TOKENS_AT_ONCE] for i in range(0, len(entries), TOKENS_AT_ONCE))


def chat_logprobs(entries: Sequence[TokenLogprobs], num_top: int, names: TokenNames) -> ChatLogprobs:
    """OpenAI's chat shape: exactly the `num_top` most likely tokens, with their bytes."""
    return ChatLogprobs([_chat_entry(entry, num_top, names) for entry in entries])


def _chat_entry(entry: TokenLogprobs, num_top: int, names: TokenNames) -> ChatTokenLogprob:
    return ChatTokenLogprob(
        names[entry.token_id],
        _finite(entry.logprob),
        names.raw(entry.token_id),
        [TopLogprob(names[i], _finite(logprob), names.raw(i)) for i, logprob in entry.top[:num_top]],
    )


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
