"""Tokens to text as they come. Half characters, and text that may become a stop string, are held back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..outputs import RequestOutput, StepOutput
from ..sampling_params import SamplingParams
from .tokenizer import Tokenizer

REPLACEMENT = "�"
# More open U+FFFD than this are not a character to come but broken bytes.
MAX_OPEN = 8
# A character has at most four bytes, so at most this many tokens wait for its last one.
MAX_PENDING_TOKENS = 3
# A decoder may treat the first token of a text in its own way (SentencePiece's drop its blank), so an answer is decoded
# behind the last few tokens of its prompt, which are looked for among a few more: control tokens have no text.
CONTEXT_TOKENS = 4
MAX_LOOKED_AT = 64


class IncrementalDetokenizer:
    """Decodes a growing list of ids by its last few: text before `_prefix` can no longer change."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        """shown_ids: control tokens that are shown in spite of `skip_special_tokens`. prompt_token_ids: the tokens
        before the first pushed one; their text is not returned."""
        self._tokenizer = tokenizer
        self._hidden_ids = tokenizer.control_ids - shown_ids if skip_special_tokens else frozenset()
        self._ids = self._context(prompt_token_ids)
        self._prefix = 0  # decoding starts here: the text of a token may depend on tokens before it
        self._read = len(self._ids)  # where the text was complete last
        # Characters of the text from `_prefix` on that have been given out, or are the prompt's.
        self._given = len(self._decode(self._prefix, self._read))

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens with a text, up to its last whole character."""
        ids = [i for i in prompt_token_ids[-MAX_LOOKED_AT:] if i not in self._hidden_ids][-CONTEXT_TOKENS:]
        while ids and self._tokenizer.decode(ids, False).endswith(REPLACEMENT):
            ids.pop()
        return ids

    def push(self, token_ids: list[int]) -> str:
        """The text that `token_ids` complete."""
        return "".join(map(self.push_one, token_ids))

    def flush(self) -> str:
        """The text still held back at the end; bytes that never became a character are dropped."""
        return self._give(self._decode(self._prefix, len(self._ids)).rstrip(REPLACEMENT))

    def push_one(self, token_id: int) -> str:
        """The text that one more token completes."""
        if token_id in self._hidden_ids:
            return ""  # it has no text and changes none: a long run of them must not make the rest longer to decode
        self._ids.append(token_id)
        text = self._decode(self._prefix, len(self._ids))
        closed = text.rstrip(REPLACEMENT)
        if len(text) - len(closed) > MAX_OPEN:
            return self._give_up()
        delta = self._give(closed)
        if delta and closed == text:
            self._prefix, self._read = self._read, len(self._ids)
            self._given = len(self._decode(self._prefix, self._read))
        return delta

    def _give_up(self) -> str:
        """Return broken bytes as U+FFFD, except the last few tokens, which may become a character."""
        end = max(self._read, len(self._ids) - MAX_PENDING_TOKENS)
        delta = self._give(self._decode(self._prefix, end))
        self._prefix = self._read = end
        self._given = 0
        return delta

    def _give(self, text: str) -> str:
        delta = text[self._given :]
        self._given = max(self._given, len(text))
        return delta

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], False) if end > start else ""


class StopStrings:
    """Finds the stop string that is complete first in text that arrives in pieces. Holds back only text that may become
    one.

    Of two stop strings that end together the longer counts, so the outcome does not depend on the pieces.
    """

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that was found or None)."""
        self._held += text
        found = self._first()
        if found is not None:
            start, stop = found
            safe = self._held[: start + (len(stop) if self._include else 0)]
            self._held = ""
            return safe, stop
        keep = self._open_suffix()
        safe, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return safe, None

    def flush(self) -> str:
        """The held text, which became no stop string."""
        held, self._held = self._held, ""
        return held

    def _first(self) -> tuple[int, str] | None:
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if not hits:
            return None
        _, start, stop = min(hits)
        return start, stop

    def _open_suffix(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class StopScope(Protocol):
    """Tells in which part of an answer stop strings count. One scope reads one answer, as it comes."""

    def push(self, text: str) -> tuple[str, str]:
        """Split a text: (text in which no stop string counts, text after it in which they do). May hold back an end
        that is undecided."""
        ...

    def finish(self) -> tuple[str, str]:
        """The same for the text that was held back, once the answer has ended."""
        ...


class TextStream:
    """Turns the engine's steps for one sequence into `RequestOutput`s."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        shown_ids: frozenset[int] = frozenset(),
        stop_scope: StopScope | None = None,
    ) -> None:
        """`stop_scope` None: stop strings count in the whole answer."""
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens, shown_ids, prompt_token_ids)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._scope = stop_scope
        self._params = params
        self._num_prompt_tokens = len(prompt_token_ids)
        self._num_output_tokens = 0

    def push(self, step: StepOutput) -> RequestOutput:
        """The text of a step. finish_reason "stop" may be set by a stop string before the engine knows of it; tokens
        that came after the one that completed it are dropped, so that an answer does not depend on what piled up."""
        num_before = self._num_output_tokens
        pieces, stop = self._read(step)
        output = RequestOutput(
            request_id=step.request_id,
            text="".join(pieces),
            pieces=pieces,
            token_ids=step.token_ids,
            logprobs=step.logprobs,
            prompt_logprobs=step.prompt_logprobs,
            finish_reason=step.finish_reason,
            stop_reason=step.stop_token_id if step.stop_token_id in self._params.stop_token_ids else None,
            error=step.error,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            queue_seconds=step.queue_seconds,
            num_cached_tokens=step.num_cached_tokens,
        )
        if stop is not None:
            num_kept = self._num_output_tokens - num_before
            output.finish_reason, output.stop_reason = "stop", stop
            output.token_ids = step.token_ids[:num_kept]
            output.logprobs = step.logprobs and step.logprobs[:num_kept]
        return output

    def _read(self, step: StepOutput) -> tuple[list[str], str | None]:
        """(text that is safe to show, by tokens; the stop string that ends it or None). Counts the tokens up to there.

        Text that the end of the answer releases belongs to the last token.
        """
        pieces: list[str] = []
        # The stop token itself is not part of the text, unless asked for.
        is_hidden = step.stop_token_id is not None and not self._params.include_stop_str_in_output
        num_visible = len(step.token_ids) - is_hidden
        for i, token_id in enumerate(step.token_ids):
            self._num_output_tokens += 1
            safe, stop = self._scan(self._detokenizer.push_one(token_id) if i < num_visible else "")
            pieces.append(safe)
            if stop is not None:
                return pieces, stop
        if step.finish_reason is None:
            return pieces or [""], None
        safe, stop = self._scan(self._detokenizer.flush(), is_last=True)
        last = pieces.pop() if pieces else ""
        return [*pieces, last + safe + ("" if stop is not None else self._stops.flush())], stop

    def _scan(self, text: str, *, is_last: bool = False) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that was found or None)."""
        if not self._params.stop:
            return text, None
        before, text = self._split(text, is_last=is_last)
        if self._num_output_tokens <= self._params.min_tokens:
            return before + text, None
        safe, stop = self._stops.push(text)
        return before + safe, stop

    def _split(self, text: str, *, is_last: bool) -> tuple[str, str]:
        """(text in which no stop string counts, text in which they do)."""
        if self._scope is None:
            return "", text
        before, after = self._scope.push(text)
        if not is_last:
            return before, after
        last_before, last_after = self._scope.finish()
        return before + last_before, after + last_after
