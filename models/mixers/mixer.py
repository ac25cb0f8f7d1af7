"""The contract of a mixer: the part of a layer that lets a token see earlier tokens.

To add one: a spec in `models.specs`, a module here that fills this class, its operations under kernels/<kind>/, and a
line in `decoder.MIXERS`. Pools, memory plans, snapshots and sessions follow from `cache`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ..forward_batch import ForwardBatch
from ..layers.build import Build
from ..layers.rotary import RotaryTables
from ..loading.target import Target
from .backends import LinearBackends
from .cache import CacheSpec, LayerCache


class MixerBuild(NamedTuple):
    """The parts that all mixers of one model share. Each mixer has a spec of its own beside them."""

    hidden_size: int
    build: Build
    rotary: RotaryTables  # a mixer that rotates asks for its table here
    linear_backends: LinearBackends  # a linear mixer takes the backend of its kind


class Mixer(nn.Module):
    """`cache` says which tensors the layer keeps of a sequence; `forward` and `fold` get them as a `LayerCache`."""

    cache: CacheSpec

    def forward(self, x: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        """x [T, d] -> [T, d]. Updates `cache` in place: the slots of the batch, its places in the blocks, and the
        snapshots that it asks for."""
        raise NotImplementedError

    def fold(self, cache: LayerCache, slots: Tensor, num_pending: Tensor, context_lens: Tensor) -> None:
        """`Decoder.fold_pending` for one layer. A mixer without a ring does nothing."""

    def targets(self, prefix: str) -> Iterator[Target]:
        """The checkpoint tensors that the mixer wants; `prefix` is the layer's name with the mixer's, dot included."""
        raise NotImplementedError
