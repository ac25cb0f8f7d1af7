"""How many decoded tokens wait in a slot's ring: counted by the host, obeyed by the kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class RingRule:
    """The ring beside each slot's state, as a linear backend wants it. The table in `models.forward_batch` says which
    rows may find tokens waiting there.

    capacity: tokens that a ring holds (C); 0 = there are no rings. replays: a decode row leaves its token in the ring.
    Otherwise only rows with drafts do.
    """

    capacity: int = 0
    replays: bool = False

    @functools.cached_property
    def after_decode(self) -> tuple[int, ...]:
        """[p] = tokens that wait after a decode row before which p = 0 .. C waited.

        A ring that replays is folded by the decode row that finds C - 1 tokens there. Every other backend writes each
        token into the state, and finds none waiting.
        """
        last = self.capacity - 1 if self.replays else 0
        return tuple(pending + 1 if pending < last else 0 for pending in range(self.capacity + 1))

    def holds(self, num_pending: int, num_new: int) -> bool:
        """Whether the ring has room for a verify row of `num_new` tokens, and for one more: a decode row that follows
        must not find it full."""
        return num_pending + num_new < self.capacity

    @property
    def most_drafts(self) -> int:
        """The most drafts of a row: beside them lie the token before them and the place that `holds` keeps free."""
        return max(0, self.capacity - 2)
