"""A model and the settings resolved for it: device, dtypes, kernels, linear backend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...kernels import KernelName, Kernels
from ...models.decoder import Decoder
from ...models.layers.build import matrices_of
from ...models.mixers.cache import slot_bytes, token_bytes
from ...models.specs import ModelSpec
from ..memory.groups import snapshot_bytes
from ..memory.pools import DTypes
from ..memory.ring import RingRule


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A forecast's model lies on `meta` instead of `device`: it has no weights, but the same sizes."""

    folder: Path
    model: Decoder
    device: torch.device
    dtype: torch.dtype
    dtypes: DTypes  # of the parts in the pools
    snapshot_dtypes: DTypes
    kernels: Kernels
    kernel_name: KernelName
    linear_backend: str
    ring: RingRule
    prompts_in_graphs: bool  # whether CUDA graphs can hold steps with prompts
    unnamed: Tensor | None = None  # [U] int64, the ids that have no token; None: all have one

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, d], rows of the model's result -> logits [N, vocab]. An id without a token has -inf: it is never
        drawn, and no share of a probability."""
        logits = self.model.compute_logits(hidden)
        return logits if self.unnamed is None else logits.index_fill_(1, self.unnamed, float("-inf"))

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def num_parameters(self) -> int:
        """Numbers of the model, each once, whatever they are packed in."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        for _, weight in matrices_of(self.model):
            total += math.prod(weight.shape) - sum(tensor.numel() for tensor in weight.tensors)
        return total

    @property
    def weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def quantised_bytes(self) -> dict[str, int]:
        """Bytes of the weights that are not plain, by format and part of the model: `int4 experts`."""
        found: dict[str, int] = {}
        for part, weight in matrices_of(self.model):
            if weight.format != "plain":
                found.setdefault(f"{weight.format} {part}", 0)
                found[f"{weight.format} {part}"] += weight.nbytes
        return found

    @property
    def state_bytes_per_slot(self) -> int:
        """Bytes of one sequence's states and rings in all layers."""
        return slot_bytes(self.model.caches, self.dtypes.sizes)

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of one snapshot of all layers."""
        return snapshot_bytes(self.model.caches, self.snapshot_dtypes.sizes)

    @property
    def snapshot_every(self) -> int:
        """Of so many tokens of a sequence is the number after which a step can save its slot, in every layer."""
        return math.lcm(*(cache.snapshot_every for cache in self.model.caches))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token in the blocks of all layers."""
        return token_bytes(self.model.caches, self.dtypes.sizes)
