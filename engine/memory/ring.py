"""The number of decoded tokens that wait in a slot's ring. The host counts them; the kernels are told the count."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class RingRule:
    """When tokens wait in the ring beside a slot's state, for one linear backend. The table in `models.forward_batch`
    says before which rows tokens may wait there.

    capacity: tokens that a ring holds (C); 0 = there are no rings. replays: decode rows leave their token in the ring;
    otherwise only verify rows do.
    """

    capacity: int = 0
    replays: bool = False

    @functools.cached_property
    def after_decode(self) -> tuple[int, ...]:
        """[p] = number of tokens that wait after a decode row, if p = 0 .. C waited before it.

        With `replays`, the decode row that finds C - 1 tokens folds the ring. Without it, a decode row writes its token
        into the state, and none waits.
        """
        last = self.capacity - 1 if self.replays else 0
        return tuple(pending + 1 if pending < last else 0 for pending in range(self.capacity + 1))

    def holds(self, num_pending: int, num_new: int) -> bool:
        """Whether the ring has room for a verify row of `num_new` tokens and for one token more: a decode row after it
        must not find the ring full."""
        return num_pending + num_new < self.capacity

    @property
    def most_drafts(self) -> int:
        """The most drafts of a row. Beside them the ring holds the token before them and the place that `holds` keeps
        free."""
        return max(0, self.capacity - 2)
