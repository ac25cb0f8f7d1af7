"""The contract of a mixer: the part of a layer that lets a token see those before it.

To add one: a module here that fills this class, its operations under kernels/<kind>/, a spec in `models.specs`, and a
case in `decoder.build_mixer`. Pools, memory plans, snapshots and sessions follow from `cache`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..forward_batch import ForwardBatch
from ..loading.target import Target
from .cache import CacheSpec, LayerCache


class Mixer(nn.Module):
    """`cache` says which tensors the layer keeps of a sequence; `forward` and `fold` get them as a `LayerCache`."""

    cache: CacheSpec

    def forward(self, x: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        """x [T, d] -> [T, d]. Updates `cache` in place: the slots of the batch, its places in the blocks, and the
        snapshots that it asks for."""
        raise NotImplementedError

    def fold(self, cache: LayerCache, slots: Tensor, num_pending: Tensor) -> None:
        """Bring the tokens that wait in the rings of these slots into their states, in place. slots: [N] int32, each
        once; num_pending: [N] int32. A mixer without a ring does nothing."""

    def targets(self, prefix: str) -> Iterator[Target]:
        """The checkpoint tensors that the mixer wants; `prefix` is the layer's name with the mixer's, dot included."""
        raise NotImplementedError
