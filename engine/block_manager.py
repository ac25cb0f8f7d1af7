"""KV blocks: who owns which, in plain integers."""

from __future__ import annotations

from collections.abc import Iterable

from .sequence import Sequence


class BlockManager:
    """Hands out the blocks 0 .. num_blocks - 1. A block has one owner: a sequence's `block_table`, or the free list."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `sequence` lacks to hold num_tokens."""
        return max(0, self.blocks_for(num_tokens) - len(sequence.block_table))

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Extend the sequence's table to hold num_tokens. The caller has checked `missing` against `num_free`."""
        for _ in range(self.missing(sequence, num_tokens)):
            sequence.block_table.append(self._free.pop())

    def release(self, sequence: Sequence) -> None:
        """Take back every block, once."""
        self._free.extend(reversed(sequence.block_table))
        del sequence.block_table[:]

    def check_integrity(self, owners: Iterable[Sequence]) -> None:
        """Every block has exactly one owner. Raises AssertionError."""
        held = [block for sequence in owners for block in sequence.block_table]
        assert sorted(held + self._free) == list(range(self.num_blocks)), "KV blocks lost or owned twice"
