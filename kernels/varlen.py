# ruff: noqa: ANN201 device functions return registers
"""Mapping programs to (segment, block) of a flat axis without reading the segment lengths on the host."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_block(p_start, num_segments, i_block, BLOCK):
    """Segment of the global block `i_block`, and the block's index in it; p_start: [num_segments + 1].

    Segment r owns the ids from start[r] // BLOCK + r up to start[r + 1] // BLOCK + r + 1, never fewer than its
    blocks; a surplus id yields a block past its segment's end.
    """
    low = 0
    high = num_segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(p_start + middle) // BLOCK + middle <= i_block:
            low = middle
        else:
            high = middle - 1
    first = tl.load(p_start + low) // BLOCK + low
    return low, i_block - first


def num_blocks(total: int, num_segments: int, block: int) -> int:
    """Upper bound on the blocks of `num_segments` segments that share `total` items."""
    return total // block + num_segments
