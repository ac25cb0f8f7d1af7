"""KV blocks and their holders, in plain integers."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable

from ..sequence import Sequence


class BlockManager:
    """Hands out the blocks 0 .. num_blocks - 1.

    The holders of a block are the sequences whose tables list it, and nodes and leases of the prefix cache. A block
    without a holder is free. Only the sequence that got the block from `grow` writes to it, at positions that no other
    holder reads.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_used = 0  # blocks that some sequence's table lists
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end
        self._tables = [0] * num_blocks  # per block, number of tables that list it
        self._holders = [0] * num_blocks  # per block, number of all holders

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
        """The number of blocks that `sequence` lacks to hold num_tokens."""
        return max(0, self.blocks_for(num_tokens) - len(sequence.block_table))

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Extend the sequence's table to hold num_tokens. The caller has checked `missing` against `num_free`."""
        self.share(sequence, [self._free.pop() for _ in range(self.missing(sequence, num_tokens))])

    def take(self, num_blocks: int) -> list[int]:
        """Give free blocks to a holder that is no sequence. The caller has checked `num_free`."""
        blocks = [self._free.pop() for _ in range(num_blocks)]
        self.hold(blocks)
        return blocks

    def share(self, sequence: Sequence, blocks: list[int]) -> None:
        """Append blocks that other holders share to the sequence's table. No holder writes to them any more."""
        self.hold(blocks)
        for block in blocks:
            self._tables[block] += 1
            self.num_used += self._tables[block] == 1
        sequence.block_table.extend(blocks)

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks of the sequence's table, and empty the table."""
        for block in sequence.block_table:
            self._tables[block] -= 1
            self.num_used -= not self._tables[block]
        self.let_go(reversed(sequence.block_table))
        sequence.block_table = array("i")

    def hold(self, blocks: Iterable[int]) -> None:
        """Count one more holder of each block."""
        for block in blocks:
            self._holders[block] += 1

    def let_go(self, blocks: Iterable[int]) -> None:
        """Count one holder less of each block, and free the blocks without any."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def is_used(self, block: int) -> bool:
        """Whether some sequence's table lists the block."""
        return self._tables[block] > 0

    def check_integrity(self, sequences: Iterable[Sequence], cached: Iterable[Iterable[int]] = ()) -> None:
        """Every block is free, or has as many holders as counted. Raises AssertionError."""
        tables = Counter(block for sequence in sequences for block in sequence.block_table)
        holders = tables + Counter(block for blocks in cached for block in blocks)
        everything = range(self.num_blocks)
        assert self._tables == [tables[block] for block in everything], "KV blocks in other tables"
        assert self._holders == [holders[block] for block in everything], "KV blocks with other holders"
        assert sorted(self._free) == [b for b in everything if not holders[b]], "KV blocks lost or owned twice"
        assert self.num_used == len(tables)
