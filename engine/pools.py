"""The two pools of device memory: recurrent states by slot, keys and values by block. Sized once, never grown."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.config import LightningSpec, SoftmaxSpec


class StatePool:
    """state [L_linear, num_slots, H, K, V]. Never zeroed: a slot's first user ignores what it finds there."""

    def __init__(
        self, layers: list[LightningSpec], num_slots: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (len(layers), num_slots, *layers[0].state_shape)
        self.state = torch.empty(shape, device=device, dtype=dtype)

    def layer(self, i: int) -> Tensor:
        """[num_slots, H, K, V] of the i-th lightning layer."""
        return self.state[i]

    @property
    def nbytes(self) -> int:
        return self.state.nbytes


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
        self.key = torch.empty(shape, device=device, dtype=dtype)
        self.value = torch.empty(shape, device=device, dtype=dtype)

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Key and value cache [num_blocks, block_size, H_kv, D] of the i-th softmax layer."""
        return self.key[i], self.value[i]

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes
