"""Drafts of a text's next tokens: what followed when it last ended like this (prompt lookup, Saxena 2023).

Needs no second model, finds what a text copies from its prompt or from itself, and learns from how much is accepted
when to leave it be. Knows nothing of batches, rings or schedules.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable

import numpy as np

from ...configs.schema import MAX_DRAFTS

MASK = (1 << 64) - 1
FEW = 64  # tokens; more are indexed by numpy, whose calls cost as much as these


class NgramIndex:
    """Where the n-grams of a growing text last ended, for n = min_n .. max_n.

    One table per n maps the hash of n tokens to the position of their last. An n-gram takes the place of an older one
    with the same hash, so what is found is compared, and memory is bounded: 2 to 4 places of 4 bytes per token and n,
    and the tokens, which is 28 to 52 bytes per token for n = 2, 3, 4. A token is indexed in constant time, when it
    is first needed.
    """

    def __init__(self, token_ids: Iterable[int] = (), *, min_n: int = 2, max_n: int = 4) -> None:
        assert 1 <= min_n <= max_n, "an n-gram has a token at least"
        self.tokens = array("i", token_ids)
        self._min_n = min_n
        rng = random.Random(0)  # any odd numbers
        self._multipliers = [rng.getrandbits(64) | 1 for _ in range(max_n)]  # of the last token, the one before, ..
        self._shift = 64 - 8  # a place is the hash's upper bits
        self._num_indexed = 0  # positions before this one are in the tables
        self._tables = self._new_tables()

    @property
    def nbytes(self) -> int:
        return sum(x.itemsize * len(x) for x in (self.tokens, *self._tables))

    def extend(self, token_ids: Iterable[int]) -> None:
        self.tokens.extend(token_ids)

    def find(self) -> int | None:
        """Where the longest n-gram that ends the text last ended before; None when none has been seen."""
        tokens, last = self.tokens, len(self.tokens) - 1
        self._index(last)  # without the text's end, which would find itself
        found = None
        total = 0
        for back, multiplier in enumerate(self._multipliers[: last + 1]):
            total += tokens[last - back] * multiplier
            if back + 1 >= self._min_n:
                place = self._tables[back + 1 - self._min_n][(total & MASK) >> self._shift]
                if back <= place < last and tokens[place - back : place + 1] == tokens[last - back :]:
                    found = place
        return found

    def continuation(self, place: int, count: int) -> list[int]:
        """The `count` tokens after a place; where the text ends they come round again, as in a text that repeats."""
        period = len(self.tokens) - 1 - place
        return [self.tokens[place + 1 + i % period] for i in range(count)]

    def _index(self, end: int) -> None:
        """Bring the tables up to the positions before `end`."""
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
        """The same for positions start up to end."""
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
        """All places name position 0, where nothing is found that is not there."""
        size = 1 << (64 - self._shift)
        return [array("i", bytes(4 * size)) for _ in self._multipliers[self._min_n - 1 :]]


class NgramProposer:
    """Drafts for one text, as many as lately were right.

    Drafts that are all accepted make the next ones longer; when none is, it pauses before the next try, for 1 token,
    then 2, 4, up to `MAX_PAUSE`: where none is ever right, one step in `MAX_PAUSE` + 1 is wasted. While it pauses
    nothing is computed.
    """

    LENGTHS = (2, 4, MAX_DRAFTS)
    MAX_PAUSE = 64  # tokens

    def __init__(self, token_ids: Iterable[int], *, min_n: int = 2, max_n: int = 4) -> None:
        self._index = NgramIndex(token_ids, min_n=min_n, max_n=max_n)
        self._level = 0  # of LENGTHS
        self._pause = 0  # tokens, after the last failure
        self._resumes_at = 0  # tokens of the text

    @property
    def num_tokens(self) -> int:
        """Of the text so far."""
        return len(self._index.tokens)

    @property
    def is_pausing(self) -> bool:
        return len(self._index.tokens) < self._resumes_at

    def extend(self, token_ids: Iterable[int]) -> None:
        """The text has grown."""
        self._index.extend(token_ids)

    def propose(self, max_tokens: int) -> list[int]:
        """At most max_tokens that may come next; often none."""
        if self.is_pausing or max_tokens <= 0:
            return []
        place = self._index.find()
        if place is None:
            return []
        return self._index.continuation(place, min(max_tokens, self.LENGTHS[self._level]))

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """How many drafts a step has brought and how many of them were right, once `extend` has its tokens."""
        if not num_drafted:
            return
        if not num_accepted:
            self._level = 0
            self._pause = min(max(1, 2 * self._pause), self.MAX_PAUSE)
            self._resumes_at = len(self._index.tokens) + self._pause
        elif num_accepted == num_drafted >= self.LENGTHS[0]:  # a single one may be right by chance
            self._level = min(self._level + 1, len(self.LENGTHS) - 1)
            self._pause = 0
        else:  # some were right, perhaps by chance: no reason to forget all failures
            self._level = sum(length <= num_accepted for length in self.LENGTHS[:-1])
            self._pause //= 4
