"""The outputs of sequences: `StepOutput` with token ids from the engine, `RequestOutput` with text for the server."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import msgspec

from .errors import ContextLengthError, QueueFullError, QueueTimeoutError, RequestError

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorCode = Literal["invalid", "context_length", "queue_full", "queue_timeout", "internal"]


PAIR = struct.Struct("<if")  # a token's id and its log-probability


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Log-probabilities at one position, from one float32 log-softmax of the raw logits.

    `top` holds the most likely tokens in descending order, and after them the chosen token if it is not among them.
    `packed` stores them as consecutive `PAIR`s. Twenty pairs take a ninth of the memory of tuples, and are decoded by
    one copy.
    """

    token_id: int
    logprob: float
    packed: bytes

    @classmethod
    def of(cls, token_id: int, logprob: float, top: Iterable[tuple[int, float]]) -> TokenLogprobs:
        return cls(token_id, logprob, b"".join(PAIR.pack(*pair) for pair in top))

    @property
    def top(self) -> list[tuple[int, float]]:
        return list(PAIR.iter_unpack(self.packed))

    @property
    def num_top(self) -> int:
        return len(self.packed) // PAIR.size


class StepOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The tokens that one engine step adds to one request. Outputs of several steps may be merged into one."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # ahead of the answer, in pieces; [0] is None
    queue_seconds: float | None = None  # set once, with the first token
    num_cached_tokens: int | None = None  # prompt tokens from the prefix cache; set once, with the first token
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop token that ended the answer, if one did; also last in token_ids
    error: str | None = None  # the message of finish_reason "error"
    error_code: ErrorCode | None = None
    error_param: str | None = None  # the request field at fault, if there is one

    @property
    def is_failure(self) -> bool:
        return self.finish_reason in ("error", "abort")

    def extend(self, later: StepOutput) -> None:
        """Append a later output of the same request, in place. It must not be a failure."""
        self.token_ids += later.token_ids
        self.logprobs = joined(self.logprobs, later.logprobs)
        self.prompt_logprobs = joined(self.prompt_logprobs, later.prompt_logprobs)
        self.finish_reason = later.finish_reason
        self.stop_token_id = later.stop_token_id
        if later.num_cached_tokens is not None:
            self.queue_seconds, self.num_cached_tokens = later.queue_seconds, later.num_cached_tokens


def refusal(request_id: str, error: RequestError | QueueFullError | QueueTimeoutError) -> StepOutput:
    """The only output of a refused request. It carries the error to the client."""
    code: ErrorCode = "invalid"
    if isinstance(error, QueueFullError):
        code = "queue_full"
    elif isinstance(error, QueueTimeoutError):
        code = "queue_timeout"
    elif isinstance(error, ContextLengthError):
        code = "context_length"
    return StepOutput(
        request_id=request_id,
        finish_reason="error",
        error=str(error),
        error_code=code,
        error_param=getattr(error, "param", None),
    )


class RequestOutput(msgspec.Struct, kw_only=True):
    """The text and tokens that one step adds to one answer. All fields except the counters are deltas.

    `text` ends neither within a character nor in a possible beginning of a stop string. The text held back for that
    comes with a later delta, at the latest with the last one.
    """

    request_id: str
    text: str = ""
    pieces: list[str] = []  # `text` in pieces, each completed by one of `token_ids`; one piece if there are no ids
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id that ended the answer
    error: str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    queue_seconds: float | None = None  # set once, with the first token
    num_cached_tokens: int | None = None  # set once, with the first token

    @property
    def num_scores(self) -> int:
        """The number of log-probabilities in the output, including alternatives."""
        if self.logprobs is None and self.prompt_logprobs is None:  # nearly always; asked for every output
            return 0
        scored = [entries for entries in (self.prompt_logprobs, self.logprobs) if entries]
        return sum(len(entries) * (1 + entries[-1].num_top if entries[-1] else 1) for entries in scored)

    def cut(self, num_tokens: int) -> list[RequestOutput]:
        """Split the output into several, none with log-probabilities of more than `num_tokens` tokens."""
        scores, entries = self.prompt_logprobs or [], self.logprobs or []
        if len(scores) + len(entries) <= num_tokens:
            return [self]
        parts = [self._part(prompt_logprobs=scores[i : i + num_tokens]) for i in range(0, len(scores), num_tokens)]
        for start in range(0, len(self.token_ids), num_tokens):
            end = start + num_tokens
            pieces = self.pieces[start : end if end < len(self.token_ids) else None]
            part = self._part(text="".join(pieces), pieces=pieces, token_ids=self.token_ids[start:end])
            part.logprobs = entries[start:end]
            part.num_output_tokens = self.num_output_tokens - max(len(self.token_ids) - end, 0)
            parts.append(part)
        first, last = parts[0], parts[-1]
        first.queue_seconds, first.num_cached_tokens = self.queue_seconds, self.num_cached_tokens
        if not self.token_ids:
            last.text, last.pieces = self.text, self.pieces
        last.finish_reason, last.stop_reason, last.error = self.finish_reason, self.stop_reason, self.error
        return parts

    def _part(self, **fields: Any) -> RequestOutput:
        num_before = self.num_output_tokens - len(self.token_ids)
        return RequestOutput(
            request_id=self.request_id,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=num_before,
            **fields,
        )

    def extend(self, later: RequestOutput) -> None:
        """Append a later output of the same request, in place, except its text and pieces. The caller joins the text of
        many outputs at once."""
        self.token_ids += later.token_ids
        self.logprobs = joined(self.logprobs, later.logprobs)
        self.prompt_logprobs = joined(self.prompt_logprobs, later.prompt_logprobs)
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.num_output_tokens = later.num_output_tokens
        if later.num_cached_tokens is not None:
            self.queue_seconds, self.num_cached_tokens = later.queue_seconds, later.num_cached_tokens


E = TypeVar("E")


def joined(logprobs: list[E] | None, more: list[E] | None) -> list[E] | None:
    """Both lists as one. Extends `logprobs` in place if it is a list."""
    if logprobs is None:
        return more
    logprobs += more or ()
    return logprobs
