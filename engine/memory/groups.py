"""The groups of layers that share a tensor of the pools, and the byte layout of a snapshot. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ...models.mixers.cache import CacheSpec, ItemSizes, Part

ALIGNMENT = 16  # bytes; Triton reads aligned addresses in wider words


class Group(NamedTuple):
    """Layers whose caches have equal parts. They share the tensors of a pool."""

    layers: tuple[int, ...]  # indices of the layers in the model
    cache: CacheSpec  # the parts of each of these layers that the pool holds


class Region(NamedTuple):
    """One part of all layers of a group, [L, *shape] in row-major order, within a snapshot."""

    group: Group
    part: Part
    offset: int  # bytes from the snapshot's beginning, a multiple of ALIGNMENT

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.group.layers) * self.part.size


def slot_groups(caches: Sequence[CacheSpec]) -> list[Group]:
    """The layers that keep a state, grouped by their slot and ring parts."""
    return _grouped(caches, lambda cache: cache._replace(token=()) if cache.slot else None)


def token_groups(caches: Sequence[CacheSpec]) -> list[Group]:
    """The layers with token parts, grouped by these parts."""
    return _grouped(caches, lambda cache: CacheSpec(token=cache.token) if cache.token else None)


def _grouped(caches: Sequence[CacheSpec], kept: Callable[[CacheSpec], CacheSpec | None]) -> list[Group]:
    """Group layers by `kept(cache)`, leaving out layers for which it is None. Groups are in the order of their first
    layers."""
    layers: dict[CacheSpec, list[int]] = {}
    for i, cache in enumerate(caches):
        parts = kept(cache)
        if parts is not None:
            layers.setdefault(parts, []).append(i)
    return [Group(tuple(indices), cache) for cache, indices in layers.items()]


def num_tensors(caches: Sequence[CacheSpec]) -> int:
    """The number of tensors that make up the pools of slots, rings and blocks."""
    slots = sum(len(group.cache.slot) + len(group.cache.ring) for group in slot_groups(caches))
    return slots + sum(len(group.cache.token) for group in token_groups(caches))


def snapshot_regions(caches: Sequence[CacheSpec], sizes: ItemSizes) -> list[Region]:
    """The regions of a snapshot: group by group, and part by part in each."""
    found: list[Region] = []
    offset = 0
    for group, part in _slot_parts(caches):
        found.append(Region(group, part, offset))
        offset += _aligned(found[-1].size * getattr(sizes, part.holds))
    return found


def snapshot_bytes(caches: Sequence[CacheSpec], sizes: ItemSizes) -> int:
    """Bytes of a snapshot of all layers. `sizes.state` is the item size of the setting `snapshot_dtype`."""
    parts = _slot_parts(caches)
    return sum(_aligned(len(group.layers) * part.size * getattr(sizes, part.holds)) for group, part in parts)


def _slot_parts(caches: Sequence[CacheSpec]) -> Iterator[tuple[Group, Part]]:
    for group in slot_groups(caches):
        for part in group.cache.slot:
            yield group, part


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
