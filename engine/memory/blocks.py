"""KV blocks: who holds which, in plain integers."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

from ..sequence import Sequence


class BlockManager:
    """Hands out the blocks 0 .. num_blocks - 1.

    A block is held by the sequences whose tables name it and by nodes of the prefix cache, and is free when nobody
    holds it. Only who got it from `grow` writes to it, at places that no other holder reads.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_used = 0  # by sequences
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end
        self._tables = [0] * num_blocks  # of sequences that name it
        self._holders = [0] * num_blocks  # these and nodes of the cache

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that only the prefix cache holds."""
        return self.num_blocks - self.num_free - self.num_used

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `sequence` lacks to hold num_tokens."""
        return max(0, self.blocks_for(num_tokens) - len(sequence.block_table))

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Extend the sequence's table to hold num_tokens. The caller has checked `missing` against `num_free`."""
        self.share(sequence, [self._free.pop() for _ in range(self.missing(sequence, num_tokens))])

    def take(self, num_blocks: int) -> list[int]:
        """Free blocks, for a holder that is no sequence. The caller has checked `num_free`."""
        blocks = [self._free.pop() for _ in range(num_blocks)]
        self.hold(blocks)
        return blocks

    def share(self, sequence: Sequence, blocks: list[int]) -> None:
        """Extend the sequence's table by blocks that others hold too, and write no more."""
        self.hold(blocks)
        for block in blocks:
            self._tables[block] += 1
            self.num_used += self._tables[block] == 1
        sequence.block_table.extend(blocks)

    def release(self, sequence: Sequence) -> None:
        """Take back the sequence's table, once."""
        for block in sequence.block_table:
            self._tables[block] -= 1
            self.num_used -= not self._tables[block]
        self.let_go(reversed(sequence.block_table))
        sequence.block_table = array("i")

    def hold(self, blocks: Iterable[int]) -> None:
        """One holder more for each."""
        for block in blocks:
            self._holders[block] += 1

    def let_go(self, blocks: Iterable[int]) -> None:
        """One holder less for each."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def is_used(self, block: int) -> bool:
        """Whether a sequence's table names it."""
        return self._tables[block] > 0

    def check_integrity(self, sequences: Iterable[Sequence], cached: Iterable[Iterable[int]] = ()) -> None:
        """Every block is free or has the holders that it counts. Raises AssertionError."""
        tables = Counter(block for sequence in sequences for block in sequence.block_table)
        holders = tables + Counter(block for blocks in cached for block in blocks)
        everything = range(self.num_blocks)
        assert self._tables == [tables[block] for block in everything], "KV blocks in other tables"
        assert self._holders == [holders[block] for block in everything], "KV blocks with other holders"
        assert sorted(self._free) == [b for b in everything if not holders[b]], "KV blocks lost or owned twice"
        assert self.num_used == len(tables)
