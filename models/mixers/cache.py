"""The tensors that a layer keeps of a sequence. Pools, plans, snapshots and sessions are made from `CacheSpec`s."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # plans are made without torch
    from torch import Tensor


class Part(NamedTuple):
    """One of the tensors that a layer keeps.

    `holds` tells its dtype. "state" is a recurrent state: the setting `state_dtype` in the pool, `snapshot_dtype` in a
    snapshot. "activation" is a value of a token: the model's own dtype everywhere. "float32" is float32 everywhere.
    """

    name: str  # unique in its layer; sessions' files tell parts apart by it
    shape: tuple[int, ...]
    holds: Literal["state", "activation", "float32"]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class CacheSpec(NamedTuple):
    """The parts of one layer: per slot, per waiting token, per token."""

    slot: tuple[Part, ...] = ()  # of a sequence of any length
    ring: tuple[Part, ...] = ()  # of each token that waits in a ring; in the pool its places follow the first dim
    ring_size: int = 0  # places of the ring, 0 without one
    token: tuple[Part, ...] = ()  # of each token, in blocks
    # A step saves a slot's content on a prompt's way only after a multiple of so many tokens of the sequence.
    snapshot_every: int = 1


class LayerCache(NamedTuple):
    """The tensors of one layer's `CacheSpec` in the pools, one per part, in the order of its parts. A forward writes to
    them in place."""

    slot: tuple[Tensor, ...] = ()  # each [num_slots, *shape]
    ring: tuple[Tensor, ...] = ()  # each [num_slots, shape[0], C, *shape[1:]] with C = ring_size; () without a ring
    token: tuple[Tensor, ...] = ()  # each [num_blocks, block_size, *shape]
    snapshots: tuple[Tensor, ...] = ()  # parallel to `slot`, each [num_snapshots, *shape]; strided views


class ItemSizes(NamedTuple):
    """Bytes of one element, for each value of `Part.holds`."""

    state: int
    activation: int
    float32: int = 4

    def of(self, parts: Iterable[Part]) -> int:
        """Bytes of one copy of each part."""
        return sum(part.size * getattr(self, part.holds) for part in parts)


def slot_bytes(caches: Iterable[CacheSpec], sizes: ItemSizes) -> int:
    """Bytes that a slot takes in all layers, rings included."""
    return sum(sizes.of(cache.slot) + cache.ring_size * sizes.of(cache.ring) for cache in caches)


def token_bytes(caches: Iterable[CacheSpec], sizes: ItemSizes) -> int:
    """Bytes that a token takes in the blocks of all layers."""
    return sum(sizes.of(cache.token) for cache in caches)
