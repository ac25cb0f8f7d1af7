"""How the gated delta rule is computed for a step."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ...kernels import Kernels
from ...kernels.delta.contract import Delta, DeltaInputs, DeltaRing, DeltaState, DeltaWeights
from ..forward_batch import ForwardBatch, RowsOfKind
from .backend import RING_SIZE, BackendFactory
from .cache import LayerCache

if TYPE_CHECKING:
    from ...kernels.delta.fla import Fla


def ring_of(cache: LayerCache, num_pending: Tensor) -> DeltaRing:
    """A layer's tokens that wait. num_pending: [B] int32, of the rows in question."""
    key, correction, decay, raw = cache.ring
    return DeltaRing(key, correction, decay, raw, num_pending)


class DeltaCall(NamedTuple):
    """The arguments of one layer for a step."""

    inputs: DeltaInputs
    weights: DeltaWeights
    cache: LayerCache  # a `DeltaState`, and a ring's parts; updated in place, snapshots too
    batch: ForwardBatch
    out: Tensor  # [T, Hv, V], written

    @property
    def pool(self) -> DeltaState:
        return DeltaState(*self.cache.slot)

    def ring(self, part: RowsOfKind) -> DeltaRing:
        return ring_of(self.cache, part.num_pending)

    def tokens(self, part: slice) -> tuple[DeltaInputs, Tensor]:
        """Inputs and out of some of the tokens."""
        return DeltaInputs(*(x[part] for x in self.inputs)), self.out[part]


class ChunkBackend:
    """Prompts in chunks; decode that writes every token into the state."""

    name = "chunk"
    replays = False
    prompts_in_graphs = True

    def __init__(self, kernels: Kernels, *, speculative: bool = False) -> None:
        self.delta = kernels.delta
        self.ring_size = RING_SIZE if speculative else 0

    def forward(self, call: DeltaCall) -> Tensor:
        batch = call.batch
        if part := batch.prompts:
            _prefill(self.delta, call, part)
        if part := batch.drafts:
            ring = call.ring(part)
            self.delta.verify(call.inputs, call.weights, call.pool, ring, part.rows, part.context_lens, call.out)
        if part := batch.decodes:
            self._decode(call, part)
        return call.out

    def _decode(self, call: DeltaCall, part: RowsOfKind) -> None:
        _decode(self.delta, call, part)


class ReplayBackend(ChunkBackend):
    """Decode that seldom writes the state: the last tokens wait in a ring per slot, and are folded into the state when
    it is full."""

    name = "replay"
    replays = True

    def __init__(self, kernels: Kernels, *, speculative: bool = False) -> None:
        super().__init__(kernels, speculative=True)

    def _decode(self, call: DeltaCall, part: RowsOfKind) -> None:
        inputs, out = call.tokens(part.tokens)
        self.delta.replay(inputs, call.weights, call.pool, call.ring(part), part.rows, part.context_lens, out)


class FlaBackend:
    """Prompts and decode by fla-core: a second opinion about the other backends, and something to measure them against.

    It has no ring, so drafts are refused. What it costs more is told in `kernels/delta/fla.py`.
    """

    name = "fla"
    replays = False
    prompts_in_graphs = False
    ring_size = 0

    def __init__(self, kernels: Kernels, *, speculative: bool = False) -> None:
        """Needs no package and no GPU before the first `forward`."""

    @functools.cached_property
    def operations(self) -> Fla:
        from ...kernels.delta import fla  # imports Triton

        return fla.load()

    def forward(self, call: DeltaCall) -> Tensor:
        if part := call.batch.prompts:
            _prefill(self.operations, call, part)
        if part := call.batch.decodes:
            _decode(self.operations, call, part)
        return call.out


def _prefill(operations: Delta | Fla, call: DeltaCall, part: RowsOfKind) -> None:
    # The operation sees no token behind the rows': it sizes its launches by them.
    inputs, out = call.tokens(slice(0, part.tokens.stop))
    places, snapshots = call.batch.snapshots, DeltaState(*call.cache.snapshots)
    operations.prefill(inputs, call.weights, call.pool, part.rows, part.context_lens, places, snapshots, out)


def _decode(operations: Delta | Fla, call: DeltaCall, part: RowsOfKind) -> None:
    inputs, out = call.tokens(part.tokens)
    operations.decode(inputs, call.weights, call.pool, part.rows, part.context_lens, out)


DELTA_BACKENDS: dict[str, BackendFactory[DeltaCall]] = {
    "auto": ReplayBackend,  # decode rows read more than they write, and so do drafts
    "chunk": ChunkBackend,
    "replay": ReplayBackend,
    "fla": FlaBackend,
}
