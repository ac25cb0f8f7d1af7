"""Parsers of flags' values. Each raises `argparse.ArgumentTypeError`, which argparse turns into a message."""

from __future__ import annotations

import argparse
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

PICTURE_SUFFIXES = (".png", ".svg")
# requests, prompt tokens, answer tokens: latency of a step, then throughput of answers, then of prompts
OFFLINE_CASES = "1x128x256 32x128x256 128x128x256 256x128x256 64x1024x256 256x1024x128 64x4096x1"
OWN_FLAGS = ("model", "load_format")


@dataclass(frozen=True)
class OfflineCase:
    """Requests handed in at once, tokens of each prompt, tokens of each answer."""

    requests: int
    prompt: int
    answer: int

    @classmethod
    def parse(cls, text: str) -> OfflineCase:
        """REQUESTSxPROMPTxANSWER."""
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} is not REQUESTSxPROMPTxANSWER, such as 32x128x256")
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.requests}x{self.prompt}x{self.answer}"


@dataclass(frozen=True)
class Span:
    """Numbers of tokens from `low` to `high`, both included, all equally likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """NUMBER or MIN:MAX."""
        found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if low > high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens or MIN:MAX, such as 128 or 64:256")
        return cls(low, high)

    def draw(self, choose: random.Random) -> int:
        return choose.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def number(text: str) -> float:
    """A number of at least 0."""
    value = _finite(text)
    if value is None or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def positive_number(text: str) -> float:
    """A number above 0."""
    value = _finite(text)
    if value is None or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def setting(text: str) -> tuple[str, str]:
    """KEY=VALUE for an engine setting without a flag of its own."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as linear_backend=replay")
    if key in OWN_FLAGS:
        raise argparse.ArgumentTypeError(f"{key} has a flag of its own: --{key.replace('_', '-')} {value}")
    return key, value


def picture_file(text: str) -> Path:
    """A file name with the suffix of a known picture format."""
    path = Path(text)
    if path.suffix not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(PICTURE_SUFFIXES)}")
    return path
