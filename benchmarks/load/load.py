"""Prompts, lengths and arrivals of requests, all drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .flags import Span

Endpoint = Literal["completions", "chat"]
PromptKind = Literal["ids", "text"]
ROUTES: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# Common words, of about one token each in most vocabularies.
COMMON = """
the of and a to in is you that it he was for on are with as his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she many some so these
would other into has more her two like him see time could no make than first been its who now people my made over did
down only way find use may water long little very after word called just where most know
"""
WORDS = COMMON.split()


@dataclass(frozen=True)
class Load:
    """The load of a case. Either `concurrency` streams each send their next request when their last one has ended, or
    `rate` requests per second arrive by themselves, on average. The other of the two is None."""

    num_requests: int
    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        if self.concurrency is not None:
            return f"{self.concurrency} stream{'s' if self.concurrency > 1 else ''}"
        return f"{self.rate:g} requests/s"


@dataclass(frozen=True)
class Request:
    """A request before it is sent."""

    index: int
    body: dict[str, Any]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """The recipe of requests. The same seed, name and index give the same request in any process."""

    endpoint: Endpoint
    model: str
    prompt_kind: PromptKind
    prompt_tokens: Span
    max_tokens: Span
    vocab_size: int
    temperature: float
    ignore_eos: bool
    wants_token_ids: bool
    seed: int
    name: str = ""  # of the case; another name gives other requests

    def request(self, index: int) -> Request:
        """The index-th request: a prompt of its own, as a body."""
        choose = random.Random(f"{self.seed}/{self.name}/{index}")
        num_prompt, max_tokens = self.prompt_tokens.draw(choose), self.max_tokens.draw(choose)
        body: dict[str, Any] = {
            "model": self.model,
            **self._prompt(choose, num_prompt),
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if (
            self.ignore_eos
        ):  # tokens after an end are often control tokens, and without their text they would have no chunk
            body |= {"ignore_eos": True, "skip_special_tokens": False}
        if self.wants_token_ids:
            body["return_token_ids"] = True
        return Request(index, body, max_tokens)

    def _prompt(self, choose: random.Random, num_tokens: int) -> dict[str, Any]:
        if self.endpoint == "completions" and self.prompt_kind == "ids":
            return {"prompt": choose.choices(range(self.vocab_size), k=num_tokens)}
        text = " ".join(choose.choices(WORDS, k=num_tokens))
        return {"prompt": text} if self.endpoint == "completions" else {"messages": [{"role": "user", "content": text}]}


def poisson_arrivals(rate: float, seed: str) -> Iterator[float]:
    """Seconds after the start at which requests arrive, without end: the gaps are exponential, 1 / rate on average."""
    choose, at = random.Random(seed), 0.0
    while True:
        at += choose.expovariate(rate)
        yield at
