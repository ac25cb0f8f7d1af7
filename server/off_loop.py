"""Work whose length a client decides. If long, it runs in a thread, and the event loop serves others meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

MAX_CHARS_INLINE = 2048  # a thread costs more than tokenizing this
CHARS_PER_SCORE = 8  # that writing a log-probability with its token's name costs
CHARS_PER_TEXT = 32  # written in the time of tokenizing one

T = TypeVar("T")


async def off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """The result of `work`, which takes as long as tokenizing `num_chars` characters."""
    return work() if num_chars <= MAX_CHARS_INLINE else await asyncio.to_thread(work)
