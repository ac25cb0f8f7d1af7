"""The sampling parameters of one sequence. Names and meanings follow the OpenAI API and vLLM."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from .errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
SEED_BOUND = 2**63
MAX_SHOWN_CHARS = 80

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTEGERS = ("n", "top_k", "min_tokens")
_OPTIONAL_INTEGERS = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_BOOLEANS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The sampling parameters of one sequence. Immutable. Raises `RequestError`, which names a field that is wrong.

    - temperature: 0 is greedy. top_k 0 or -1, top_p 1, min_p 0, penalties 0 (repetition 1) switch a filter off.
    - seed: makes the drawn tokens independent of the other sequences in a batch.
    - logprobs: number of alternatives to report per token; 0 = the chosen token alone, None = off. prompt_logprobs: the
      same for the prompt.
    - grammar: constrains the answer, in llguidance's dialect of Lark (`engine.text.grammar` makes it from JSON schemas,
      patterns and choices).
    - max_tokens: 0 computes the prompt and stops; None = up to the context length.
    - stop: may be a single string.
    - n: number of answers to a prompt. Each is a sequence of its own, with the parameters of `choice`.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        self._check_types()
        _check_range("n", self.n, 1, 2**31 - 1)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("top_k", self.top_k, -1, 2**31 - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens"
            )
        if self.seed is not None:
            _check_range("seed", self.seed, -SEED_BOUND, SEED_BOUND - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_range(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_stop()
        self._check_logit_bias()

    def _check_types(self) -> None:
        """Raise `RequestError` for a wrong type. msgspec checks types only when it decodes, not in Python calls."""
        for name in _NUMBERS:
            _require(name, getattr(self, name), (int, float), "a number")
        for name in _INTEGERS:
            _require(name, getattr(self, name), int, "an integer")
        for name in _OPTIONAL_INTEGERS:
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), int, "an integer or None")
        if self.grammar is not None and not isinstance(self.grammar, str):
            raise RequestError(f"grammar must be a string or None, got {_shown(self.grammar)}", "grammar")
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {_shown(getattr(self, name))}", name)
        for name, kind, words in (("stop", str, "strings"), ("stop_token_ids", int, "token ids")):
            values = getattr(self, name)
            if not isinstance(values, tuple | list):
                raise RequestError(f"{name} must be a tuple of {words}, got {_shown(values)}", name)
            for value in values:
                _require(name, value, kind, f"a tuple of {words}")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise RequestError(f"logit_bias must be a dict, got {_shown(self.logit_bias)}", "logit_bias")
            for key, bias in self.logit_bias.items():
                _require("logit_bias", key, int, "a dict of token ids")
                _require("logit_bias", bias, (int, float), "a dict of numbers")

    def _check_stop(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", "stop")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"each stop string must have 1 to {MAX_STOP_CHARS} characters, got {len(text)}", "stop"
                )

    def _check_logit_bias(self) -> None:
        if not self.logit_bias:
            return
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias takes at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}", "logit_bias"
            )
        for bias in self.logit_bias.values():
            _check_range("logit_bias", bias, -100.0, 100.0)

    def choice(self, j: int) -> SamplingParams:
        """The parameters of choice j of n. Choice j draws with seed + j, wrapped to 64 bits, so the choices differ and
        each can be repeated."""
        seed = None if self.seed is None else (self.seed + j + SEED_BOUND) % (2 * SEED_BOUND) - SEED_BOUND
        return msgspec.structs.replace(self, n=1, seed=seed)

    @property
    def is_penalised(self) -> bool:
        """Whether a token's earlier occurrences change its logit."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _require(name: str, value: Any, kind: type | tuple[type, ...], words: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RequestError(f"{name} must be {words}, got {_shown(value)}", name)


def _shown(value: Any) -> str:
    return repr(value)[:MAX_SHOWN_CHARS]


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    above = value > low if open_low else value >= low
    if not (above and value <= high) or math.isnan(value):
        bracket = "(" if open_low else "["
        raise RequestError(f"{name} must be in {bracket}{low}, {high}], got {_shown(value)}", name)
