# ruff: noqa: ANN201 device functions return registers
"""The chunks of prompts' rows: CHUNK tokens each, cut at multiples of CHUNK of a sequence's positions.

So a row that starts in the middle of a chunk meets the same chunks behind it as if it had started at position 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .contract import CHUNK


@triton.jit
def find_chunk(p_starts, p_contexts, p_continues, num_rows, i, CHUNK: tl.constexpr):
    """Of the global chunk i: its row b, that row's first token on the flat axis, and the chunk's tokens from `first` up
    to `end`, counted from there; none for a surplus id.

    Row b owns ids from starts[b] // CHUNK + 2 b up to the next row's: never fewer than its chunks, of which the first
    and the last may be short.
    """
    low = 0
    high = num_rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(p_starts + middle) // CHUNK + 2 * middle <= i:
            low = middle
        else:
            high = middle - 1
    start = tl.load(p_starts + low)
    n = tl.load(p_starts + low + 1) - start
    context = tl.where(tl.load(p_continues + low), tl.load(p_contexts + low), 0)
    local = i - (start // CHUNK + 2 * low)
    first = tl.maximum(local * CHUNK - context % CHUNK, 0)
    end = tl.minimum((local + 1) * CHUNK - context % CHUNK, n)
    return low, start.to(tl.int64), first, end


def num_chunks(num_tokens: int, num_rows: int) -> int:
    """Upper bound on the chunks of so many rows that share so many tokens."""
    return num_tokens // CHUNK + 2 * num_rows
