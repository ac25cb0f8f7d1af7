"""Tokens to text as they come: never half a character, never what may turn out to be a stop string."""

from __future__ import annotations

from .outputs import RequestOutput, StepOutput
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

REPLACEMENT = "�"
# A character has at most four bytes, so more open tokens than this are not a character to come but broken bytes.
MAX_OPEN_TOKENS = 8


class IncrementalDetokenizer:
    """Decodes a growing list of ids by its last few: what is before `_prefix` can no longer change."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0  # decoding starts here, so that what a token's text owes to its left neighbours is kept
        self._read = 0  # tokens whose text has been given out

    def push(self, token_ids: list[int]) -> str:
        """The text that `token_ids` complete."""
        self._ids += token_ids
        before = self._decode(self._prefix, self._read)
        now = self._decode(self._prefix, len(self._ids))
        is_open = now.endswith(REPLACEMENT) and len(self._ids) - self._read <= MAX_OPEN_TOKENS
        if is_open or len(now) <= len(before):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left at the end; bytes that never became a character are dropped."""
        before = self._decode(self._prefix, self._read)
        now = self._decode(self._prefix, len(self._ids))
        self._read = len(self._ids)
        return now[len(before) :].rstrip(REPLACEMENT)

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], self._skip_special_tokens) if end > start else ""


class StopStrings:
    """Finds the earliest stop string in text that arrives in pieces, holding back only what may become one."""

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that was found or None)."""
        self._held += text
        found = self._earliest()
        if found is not None:
            start, stop = found
            safe = self._held[: start + (len(stop) if self._include else 0)]
            self._held = ""
            return safe, stop
        keep = self._open_suffix()
        safe, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return safe, None

    def flush(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held

    def _earliest(self) -> tuple[int, str] | None:
        hits = [(start, -len(stop), stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if not hits:
            return None
        start, _, stop = min(hits)
        return start, stop

    def _open_suffix(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class TextStream:
    """Turns the engine's steps for one sequence into `RequestOutput`s."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, num_prompt_tokens: int) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens = 0

    def push(self, step: StepOutput) -> RequestOutput:
        """The text of a step. finish_reason "stop" may be set by a stop string before the engine knows of it."""
        self._num_output_tokens += len(step.token_ids)
        output = RequestOutput(
            request_id=step.request_id,
            token_ids=step.token_ids,
            logprobs=step.logprobs,
            prompt_logprobs=step.prompt_logprobs,
            finish_reason=step.finish_reason,
            stop_reason=step.stop_token_id if step.stop_token_id in self._params.stop_token_ids else None,
            error=step.error,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
        )
        text = self._detokenizer.push(self._visible(step))
        if step.finish_reason is not None:
            text += self._detokenizer.flush()
        output.text = self._scan(text, output)
        return output

    def _visible(self, step: StepOutput) -> list[int]:
        """The stop token itself is not part of the text, unless asked for."""
        if step.stop_token_id is not None and not self._params.include_stop_str_in_output:
            return step.token_ids[:-1]
        return step.token_ids

    def _scan(self, text: str, output: RequestOutput) -> str:
        if self._num_output_tokens <= self._params.min_tokens and output.finish_reason is None:
            return text  # no stop string counts yet
        safe, stop = self._stops.push(text)
        if stop is not None:
            output.finish_reason, output.stop_reason = "stop", stop
        elif output.finish_reason is not None:
            safe += self._stops.flush()
        return safe
