"""The two pools of device memory: recurrent states by slot, keys and values by block. Sized once, never grown."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.mixers.cache import LayerCache
from ...models.specs import LightningSpec, SoftmaxSpec


class StatePool:
    """state [L_linear, num_slots, H, K, V] in `dtype`, and beside each state a ring of the last `ring_size` keys
    [.., H, C, K] and values [.., H, C, V] in `ring_dtype`, none unless the backend wants them.

    Never zeroed: a slot's first user ignores what it finds there.
    """

    def __init__(
        self,
        layers: list[LightningSpec],
        num_slots: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        ring_size: int,
        ring_dtype: torch.dtype,
    ) -> None:
        heads, K, V = layers[0].state_shape
        shape = (len(layers), num_slots, heads)
        self.state = torch.empty(*shape, K, V, device=device, dtype=dtype)
        self.key_ring = torch.empty(*shape, ring_size, K, device=device, dtype=ring_dtype)
        self.value_ring = torch.empty(*shape, ring_size, V, device=device, dtype=ring_dtype)

    def slot(self, i: int) -> Tensor:
        """A slot's states [L_linear, H, K, V]. Tokens that wait in its ring are not in them."""
        return self.state[:, i]

    def layer(self, i: int, snapshots: SnapshotPool) -> LayerCache:
        """The i-th lightning layer's part, and that of the kept states on the device."""
        ring = (self.key_ring[i], self.value_ring[i]) if self.key_ring.shape[3] else ()
        return LayerCache(slot=(self.state[i],), ring=ring, snapshots=(snapshots.states[:, i],))

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.key_ring.nbytes + self.value_ring.nbytes


class SnapshotPool:
    """States of the prefix cache, each [L_linear, H, K, V] in `dtype`: `num_snapshots` on the device and, counted on
    from there, those that `allocate_on_host` adds. Each lies in one piece, so that a copy between the two is one."""

    def __init__(
        self,
        layers: list[LightningSpec],
        num_snapshots: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (len(layers), *layers[0].state_shape)
        self.states = torch.empty(num_snapshots, *shape, device=device, dtype=dtype)
        self.host_states = torch.empty(0, *shape, dtype=dtype)

    def allocate_on_host(self, num_on_host: int) -> None:
        """Take host memory for so many more, pinned where the others are on a GPU."""
        is_pinned = self.states.is_cuda and num_on_host > 0
        shape = (num_on_host, *self.states.shape[1:])
        self.host_states = torch.empty(shape, dtype=self.states.dtype, pin_memory=is_pinned)

    def __getitem__(self, i: int) -> Tensor:
        on_device = self.states.shape[0]
        return self.states[i] if i < on_device else self.host_states[i - on_device]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.states.nbytes


class KVPool:
    """keys and values, each [L_full, num_blocks, block_size, H_kv, D]."""

    def __init__(
        self,
        layers: list[SoftmaxSpec],
        num_blocks: int,
        block_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        heads, dim = (layers[0].num_kv_heads, layers[0].head_dim) if layers else (0, 0)
        shape = (len(layers), num_blocks, block_size, heads, dim)
        self.num_blocks = num_blocks
        self.key = torch.empty(shape, device=device, dtype=dtype)
        self.value = torch.empty(shape, device=device, dtype=dtype)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """The contents of blocks [N] int64 to others."""
        for cache in (*self.key, *self.value):  # layer by layer: what lies between is a copy
            cache.index_copy_(0, target, cache.index_select(0, source))

    def layer(self, i: int) -> LayerCache:
        """Key and value cache [num_blocks, block_size, H_kv, D] of the i-th softmax layer."""
        return LayerCache(token=(self.key[i], self.value[i]))

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes
