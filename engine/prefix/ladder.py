"""The ladder: the places at which a prompt leaves snapshots (rungs) on its way. A later prompt may part from it
anywhere, and then resumes at the last rung before.

The first rung lies at `FIRST` times `min_tokens`. Each next one is a third further, but at most `interval` tokens. So
if two prompts share at least 4 x `min_tokens` tokens, a rung spares at least 3/4 of them, and a larger share of many.
Rungs are rounded down to places where the model's layers can save their states (`CacheSpec.snapshot_every`).
"""

from __future__ import annotations

import bisect

FIRST = 3
MAX_LEVEL = 3


class Ladder:
    """The rungs, the same for every prompt. `interval` 0 = no rungs. All lie at multiples of `every`."""

    def __init__(self, min_tokens: int, interval: int, every: int = 1) -> None:
        self._min_tokens = min_tokens
        self._interval = interval
        self._every = every
        first = min(FIRST * min_tokens, interval)
        self._rungs = [self._rounded(first, after=0)] if interval else []  # increasing; grows on demand

    def between(self, start: int, end: int) -> list[tuple[int, int]]:
        """(number of tokens before it, level) of each rung after `start` and up to `end` tokens. Every other rung has
        level 0, every other of the rest level 1, and so on up to `MAX_LEVEL`."""
        if not self._rungs:
            return []
        while self._rungs[-1] <= end:
            last = self._rungs[-1]
            self._rungs.append(self._rounded(last + min(self._interval, max(self._min_tokens, last // 3)), after=last))
        places = range(bisect.bisect_right(self._rungs, start), bisect.bisect_right(self._rungs, end))
        return [(self._rungs[i], _level(i + 1)) for i in places]

    def _rounded(self, place: int, after: int) -> int:
        return max(place // self._every * self._every, after + self._every)


def _level(number: int) -> int:
    """The number of times that 2 divides the number, at most MAX_LEVEL."""
    return min((number & -number).bit_length() - 1, MAX_LEVEL)
