"""Work whose length a client decides: long work runs in a thread, and the event loop serves others meanwhile.

The unit of cost is the time of tokenizing one character.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

MAX_CHARS_INLINE = 2048  # work below this costs less than handing it to a thread
CHARS_PER_SCORE = 8  # cost of writing one log-probability with its token's name
CHARS_PER_TEXT = 32  # characters of text that are written at the cost of one

T = TypeVar("T")


async def off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """The result of `work`, whose cost is that of tokenizing `num_chars` characters."""
    return work() if num_chars <= MAX_CHARS_INLINE else await asyncio.to_thread(work)
