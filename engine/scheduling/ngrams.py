"""Drafts of a text's next tokens, taken from the text itself (prompt lookup, Saxena 2023).

The drafts are the tokens that followed the latest earlier occurrence of the text's last n tokens. They need no second
model and are right where a text copies its prompt or repeats itself. The proposer drafts less while its drafts are
rejected. This module knows nothing of batches, rings or schedules.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable

import numpy as np

from ...configs.schema import MAX_DRAFTS

MASK = (1 << 64) - 1
FEW = 64  # tokens; indexing more is faster with numpy


class NgramIndex:
    """The latest position at which each n-gram of a growing text ended, for n = min_n .. max_n.

    One table per n maps the hash of n tokens to the position of the last of them. A newer n-gram overwrites an older
    one with the same hash, so `find` compares the tokens at a position that it has looked up. A table has 2 to 4
    entries of 4 bytes per token. With the tokens that makes 28 to 52 bytes per token for n = 2, 3, 4. Tokens are
    indexed on demand, each in constant time.
    """

    def __init__(self, token_ids: Iterable[int] = (), *, min_n: int = 2, max_n: int = 4) -> None:
        assert 1 <= min_n <= max_n, "an n-gram has a token at least"
        self.tokens = array("i", token_ids)
        self._min_n = min_n
        rng = random.Random(0)  # any odd numbers
        self._multipliers = [rng.getrandbits(64) | 1 for _ in range(max_n)]  # for the last token, the one before, ..
        self._shift = 64 - 8  # the upper bits of a hash are its index in a table
        self._num_indexed = 0  # positions before this one are in the tables
        self._tables = self._new_tables()

    @property
    def nbytes(self) -> int:
        return sum(x.itemsize * len(x) for x in (self.tokens, *self._tables))

    def extend(self, token_ids: Iterable[int]) -> None:
        self.tokens.extend(token_ids)

    def find(self) -> int | None:
        """The position at which the longest n-gram that ends the text ended before. None if no such n-gram is known."""
        tokens, last = self.tokens, len(self.tokens) - 1
        self._index(last)  # without the last token, or the text's end would find itself
        found = None
        total = 0
        for back, multiplier in enumerate(self._multipliers[: last + 1]):
            total += tokens[last - back] * multiplier
            if back + 1 >= self._min_n:
                place = self._tables[back + 1 - self._min_n][(total & MASK) >> self._shift]
                if back <= place < last and tokens[place - back : place + 1] == tokens[last - back :]:
                    found = place
        return found

    def continuation(self, position: int, count: int) -> list[int]:
        """The `count` tokens after a position. Past the text's end they start over after the position, as if the text
        repeated from there."""
        period = len(self.tokens) - 1 - position
        return [self.tokens[position + 1 + i % period] for i in range(count)]

    def _index(self, end: int) -> None:
        """Index all positions before `end`."""
        if 2 * end > 1 << (64 - self._shift):
            self._shift = 64 - (2 * end - 1).bit_length()
            self._num_indexed, self._tables = 0, self._new_tables()
        if end - self._num_indexed > FEW:
            self._index_many(self._num_indexed, end)
        else:
            for position in range(self._num_indexed, end):
                self._index_one(position)
        self._num_indexed = max(end, self._num_indexed)

    def _index_one(self, position: int) -> None:
        total = 0
        for back, multiplier in enumerate(self._multipliers[: position + 1]):
            total += self.tokens[position - back] * multiplier
            if back + 1 >= self._min_n:
                self._tables[back + 1 - self._min_n][(total & MASK) >> self._shift] = position

    def _index_many(self, start: int, end: int) -> None:
        """Index positions start .. end - 1, with numpy."""
        first = max(start + 1 - len(self._multipliers), 0)
        tokens = np.array(self.tokens[first:end], dtype=np.uint64)
        totals = np.zeros_like(tokens)
        for back, multiplier in enumerate(self._multipliers):
            totals[back:] += tokens[: len(tokens) - back] * np.uint64(multiplier)
            if back + 1 >= self._min_n:
                positions = np.arange(max(start, back), end, dtype=np.int32)
                places = totals[positions[0] - first :] >> np.uint64(self._shift)
                np.frombuffer(self._tables[back + 1 - self._min_n], dtype=np.int32)[places] = positions

    def _new_tables(self) -> list[array[int]]:
        """Tables whose entries are all position 0. `find` compares tokens, so such an entry finds nothing wrong."""
        size = 1 << (64 - self._shift)
        return [array("i", bytes(4 * size)) for _ in self._multipliers[self._min_n - 1 :]]


class NgramProposer:
    """Drafts for one text, whose number follows how many were accepted lately.

    If all drafts of a step are accepted, the next are more. If none is, the proposer pauses for 1 token, then 2, 4, up
    to `MAX_PAUSE`. So a text whose drafts are never right wastes one step in `MAX_PAUSE` + 1. A pausing proposer
    computes nothing.
    """

    LENGTHS = (2, 4, MAX_DRAFTS)
    MAX_PAUSE = 64  # tokens

    def __init__(self, token_ids: Iterable[int], *, min_n: int = 2, max_n: int = 4) -> None:
        self._index = NgramIndex(token_ids, min_n=min_n, max_n=max_n)
        self._level = 0  # index into LENGTHS
        self._pause = 0  # tokens; the length of the last pause
        self._resumes_at = 0  # length of the text, in tokens, at which the pause ends

    @property
    def num_tokens(self) -> int:
        """Tokens of the text so far."""
        return len(self._index.tokens)

    @property
    def is_pausing(self) -> bool:
        return len(self._index.tokens) < self._resumes_at

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens to the text."""
        self._index.extend(token_ids)

    def propose(self, max_tokens: int) -> list[int]:
        """Draft at most max_tokens next tokens; often none."""
        if self.is_pausing or max_tokens <= 0:
            return []
        position = self._index.find()
        if position is None:
            return []
        return self._index.continuation(position, min(max_tokens, self.LENGTHS[self._level]))

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learn how many drafts a step verified and how many it accepted. Call `extend` with the step's tokens
        before."""
        if not num_drafted:
            return
        if not num_accepted:
            self._level = 0
            self._pause = min(max(1, 2 * self._pause), self.MAX_PAUSE)
            self._resumes_at = len(self._index.tokens) + self._pause
        elif num_accepted == num_drafted >= self.LENGTHS[0]:  # a single draft may be right by chance
            self._level = min(self._level + 1, len(self.LENGTHS) - 1)
            self._pause = 0
        else:  # some were right, perhaps by chance: earlier failures still count
            self._level = sum(length <= num_accepted for length in self.LENGTHS[:-1])
            self._pause //= 4
