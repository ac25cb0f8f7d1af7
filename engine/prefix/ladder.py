"""Where a prompt leaves snapshots on its way, so that a later prompt that parts from it anywhere resumes near by.

The first rung lies at `FIRST` times `min_tokens`, and each is a third further than the one before, or `interval` tokens
if that is less: of the tokens that two prompts share, from 4 x `min_tokens` on, a rung holds at least 3/4, and more
where they are many. Each is rounded down to a place where the model's layers can save their states
(`CacheSpec.snapshot_every`).
"""

from __future__ import annotations

import bisect

FIRST = 3
MAX_LEVEL = 3


class Ladder:
    """The rungs of every prompt, which depend on the settings and the model alone. `interval` 0 = no rungs. All lie at
    multiples of `every`."""

    def __init__(self, min_tokens: int, interval: int, every: int = 1) -> None:
        self._min_tokens = min_tokens
        self._interval = interval
        self._every = every
        first = min(FIRST * min_tokens, interval)
        self._rungs = [self._rounded(first, after=0)] if interval else []  # increasing; grows on demand

    def between(self, start: int, end: int) -> list[tuple[int, int]]:
        """(tokens, level) of the rungs after more than `start` and up to `end` tokens. Every other rung has level 0,
        every other of the rest level 1, and so on up to `MAX_LEVEL`."""
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
    """How often 2 divides the number, at most MAX_LEVEL."""
    return min((number & -number).bit_length() - 1, MAX_LEVEL)
