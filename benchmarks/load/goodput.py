"""Goodput: the share of requests whose latencies keep given bounds."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
LATENCIES = ("ttft", "itl", "tpot", "e2e")

RequestLatency = dict[str, float]


@dataclass(frozen=True)
class Bound:
    """A latency of a request that must not exceed so many seconds. `itl` is the 99th percentile of its own tokens."""

    latency: str
    seconds: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Bound:
        """LATENCY:TIME, such as ttft:200ms."""
        found = re.fullmatch(rf"({'|'.join(LATENCIES)}):(\d+(?:\.\d+)?)(us|ms|s)", text)
        if not found:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not LATENCY:TIME, such as ttft:200ms; latencies are {', '.join(LATENCIES)}, "
                f"units {', '.join(UNITS)}"
            )
        return cls(found[1], float(found[2]) * UNITS[found[3]], text)

    def __str__(self) -> str:
        return self.text


def count_within(bounds: Sequence[Bound], requests: Sequence[RequestLatency]) -> int:
    """The number of requests that keep every bound."""
    return sum(all(request[bound.latency] <= bound.seconds for bound in bounds) for request in requests)
