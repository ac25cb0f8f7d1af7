"""What a layer keeps of a sequence. Pools, memory plans, snapshots and sessions are made from it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple


class Part(NamedTuple):
    """One tensor of those that a layer keeps.

    `holds` tells its dtype. "state" is a recurrent state: the setting `state_dtype` in the pool, `snapshot_dtype` in a
    snapshot. "activation" is what a token left: the model's own dtype everywhere.
    """

    name: str  # unique in its layer; sessions' files tell parts apart by it
    shape: tuple[int, ...]
    holds: Literal["state", "activation"]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class CacheSpec(NamedTuple):
    """The parts of one layer, by what they grow with."""

    slot: tuple[Part, ...] = ()  # of a sequence, whatever its length
    ring: tuple[Part, ...] = ()  # of each token that waits in a ring; in the pool its places follow the first dim
    ring_size: int = 0  # places of the ring, 0 without one
    token: tuple[Part, ...] = ()  # of each token, in blocks
