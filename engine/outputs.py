"""What travels up from the engine: ids, log-probabilities and reasons, then, beyond the tokenizer, text."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorCode = Literal["invalid", "context_length", "queue_full", "queue_timeout", "internal"]


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position, from one float32 log-softmax of the raw logits.

    `top` holds the most likely tokens in descending order, and the chosen token too when it is not among them.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class StepOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one engine step adds to one request, or several steps when their outputs have piled up."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first output; [0] is None
    queue_seconds: float | None = None  # once, with the first output
    num_cached_tokens: int | None = None  # of the prompt, not computed again; once, with the first output
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id that ended it, when a stop token did (also last in token_ids)
    error: str | None = None  # the message of finish_reason "error"
    error_code: ErrorCode | None = None
    error_param: str | None = None  # the request field at fault, when one is

    @property
    def is_failure(self) -> bool:
        return self.finish_reason in ("error", "abort")

    def extend(self, later: StepOutput) -> None:
        """Take in what the same request got next, unless that is a failure."""
        self.token_ids += later.token_ids
        self.logprobs = _joined(self.logprobs, later.logprobs)
        self.finish_reason = later.finish_reason
        self.stop_token_id = later.stop_token_id


class RequestOutput(msgspec.Struct, kw_only=True):
    """What one step adds to one answer, as text. All fields but the counters are deltas.

    `text` never ends in half a character or in what may become a stop string; the last delta releases what was held
    back.
    """

    request_id: str
    text: str = ""
    pieces: list[str] = []  # `text`, cut where a token completed it: one for each of `token_ids`, and one at least
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it
    error: str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    queue_seconds: float | None = None  # once, with the first output
    num_cached_tokens: int | None = None  # likewise

    def extend(self, later: RequestOutput) -> None:
        """Take in all but the text and its pieces of what the same request got next: many are better joined once."""
        self.token_ids += later.token_ids
        self.logprobs = _joined(self.logprobs, later.logprobs)
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.num_output_tokens = later.num_output_tokens


def _joined(logprobs: list[TokenLogprobs] | None, more: list[TokenLogprobs] | None) -> list[TokenLogprobs] | None:
    """`logprobs`, grown in place."""
    if logprobs is None:
        return more
    logprobs += more or ()
    return logprobs
