"""The pools of device memory: states by slot, keys and values by block, snapshots. Sized once, never grown.

Layers with equal parts share a tensor per part, whose first dim is the layer. The pools are never zeroed: a new owner
of a slot, a block or a snapshot must not read its old content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.mixers.cache import CacheSpec, ItemSizes, LayerCache, Part
from .groups import Region, slot_groups, snapshot_bytes, snapshot_regions, token_groups


class DTypes(NamedTuple):
    """The dtypes of parts, by `Part.holds`."""

    state: torch.dtype
    activation: torch.dtype
    float32: torch.dtype = torch.float32

    def of(self, part: Part) -> torch.dtype:
        dtype: torch.dtype = getattr(self, part.holds)
        return dtype

    @property
    def sizes(self) -> ItemSizes:
        return ItemSizes(self.state.itemsize, self.activation.itemsize)


class StatePool:
    """Slots and rings of all layers.

    slots: per group and slot part [L, num_slots, *shape]; rings: per group and ring part
    [L, num_slots, shape[0], C, *shape[1:]] with the group's C = ring_size.
    """

    def __init__(self, caches: Sequence[CacheSpec], num_slots: int, dtypes: DTypes, *, device: torch.device) -> None:
        self.groups = slot_groups(caches)
        self.slots: list[list[Tensor]] = []
        self.rings: list[list[Tensor]] = []
        for layers, cache in self.groups:
            lead = (len(layers), num_slots)
            self.slots.append(
                [torch.empty(*lead, *part.shape, device=device, dtype=dtypes.of(part)) for part in cache.slot]
            )
            self.rings.append(
                [
                    torch.empty(
                        *lead, part.shape[0], cache.ring_size, *part.shape[1:], device=device, dtype=dtypes.of(part)
                    )
                    for part in cache.ring
                ]
            )
        self._flat = [tensor for group in self.slots for tensor in group]

    def slot(self, i: int) -> list[Tensor]:
        """The slot parts of slot i, each [L, *shape], in the order of a snapshot's regions. Tokens that wait in the
        slot's rings are not included."""
        return [tensor[:, i] for tensor in self._flat]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, each [L, num_slots, ...]."""
        return [tensor for group in (*self.slots, *self.rings) for tensor in group]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class SnapshotPool:
    """The snapshots of the prefix cache: `num_snapshots` on the device, and host snapshots numbered after them.

    A snapshot is a row of bytes in which each part has its region, so that moving one to the host is a single copy.
    rows: [num_snapshots, row_bytes] uint8; parts: per region [num_snapshots, L, *shape], views of `rows`.
    """

    def __init__(
        self, caches: Sequence[CacheSpec], num_snapshots: int, dtypes: DTypes, *, device: torch.device
    ) -> None:
        self.regions = snapshot_regions(caches, dtypes.sizes)
        self.row_bytes = snapshot_bytes(caches, dtypes.sizes)
        self.dtypes = dtypes
        self.rows = torch.empty(num_snapshots, self.row_bytes, dtype=torch.uint8, device=device)
        self.parts = self._views(self.rows)
        self.host_rows = torch.empty(0, self.row_bytes, dtype=torch.uint8)
        self._host_parts = self._views(self.host_rows)
        self._of_layer: dict[int, list[tuple[int, int]]] = {}  # per slot part: (region, index of the layer in it)
        for r, region in enumerate(self.regions):
            for i, layer in enumerate(region.group.layers):
                self._of_layer.setdefault(layer, []).append((r, i))

    def allocate_on_host(self, num_on_host: int) -> None:
        """Take host memory for `num_on_host` snapshots, pinned where the device is a GPU."""
        is_pinned = self.rows.is_cuda and num_on_host > 0
        self.host_rows = torch.empty(num_on_host, self.row_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self._host_parts = self._views(self.host_rows)

    def row(self, i: int) -> Tensor:
        """The bytes [row_bytes] uint8 of snapshot i, on the device or the host."""
        on_device = self.rows.shape[0]
        return self.rows[i] if i < on_device else self.host_rows[i - on_device]

    def __getitem__(self, i: int) -> list[Tensor]:
        """The parts of snapshot i, each [L, *shape], in the order of the regions."""
        on_device = self.rows.shape[0]
        if i < on_device:
            return [part[i] for part in self.parts]
        return [part[i - on_device] for part in self._host_parts]

    def layer(self, i: int, layer: int) -> list[Tensor]:
        """The parts of one layer in snapshot i, each [*shape], in the order of the layer's slot parts."""
        parts = self[i]
        return [parts[region][i] for region, i in self._of_layer[layer]]

    def _views(self, rows: Tensor) -> list[Tensor]:
        return [self._view(rows, region) for region in self.regions]

    def _view(self, rows: Tensor, region: Region) -> Tensor:
        """The region of every row, [N, L, *shape], as a view of rows [N, row_bytes] uint8."""
        dtype = self.dtypes.of(region.part)
        items = rows.view(dtype).narrow(1, region.offset // dtype.itemsize, region.size)
        return items.unflatten(1, (len(region.group.layers), *region.part.shape))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.rows.nbytes


class KVPool:
    """The token parts of all layers (keys and values), in blocks.

    tokens: per group and token part [L, num_blocks, block_size, *shape].
    """

    def __init__(
        self, caches: Sequence[CacheSpec], num_blocks: int, block_size: int, dtypes: DTypes, *, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.groups = token_groups(caches)
        self.tokens = [
            [
                torch.empty(len(layers), num_blocks, block_size, *part.shape, device=device, dtype=dtypes.of(part))
                for part in cache.token
            ]
            for layers, cache in self.groups
        ]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy blocks `source` [N] int64 to blocks `target` [N] int64. No block may be in both."""
        for tensor in self.tensors:
            for layer in tensor:  # one layer at a time keeps the temporary copy small
                layer.index_copy_(0, target, layer.index_select(0, source))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, each [L, num_blocks, block_size, ...]."""
        return [tensor for group in self.tokens for tensor in group]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def layer_caches(
    caches: Sequence[CacheSpec], states: StatePool, snapshots: SnapshotPool, kv: KVPool
) -> list[LayerCache]:
    """Each layer's views of the pools, in the model's order."""
    found = [LayerCache()] * len(caches)
    kept = iter(snapshots.parts)
    for group, slots, rings in zip(states.groups, states.slots, states.rings, strict=True):
        regions = [next(kept) for _ in slots]
        for i, layer in enumerate(group.layers):
            found[layer] = LayerCache(
                slot=tuple(tensor[i] for tensor in slots),
                ring=tuple(tensor[i] for tensor in rings),
                snapshots=tuple(region[:, i] for region in regions),
            )
    for group, tokens in zip(kv.groups, kv.tokens, strict=True):
        for i, layer in enumerate(group.layers):
            found[layer] = found[layer]._replace(token=tuple(tensor[i] for tensor in tokens))
    return found
