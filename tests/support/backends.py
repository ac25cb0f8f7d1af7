"""Backends of linear layers, and one for lightning layers that knows nothing but the documented protocol."""

from __future__ import annotations

from leyden.kernels import Kernels
from leyden.models.mixers.backend import LinearBackend
from leyden.models.mixers.delta_backends import DELTA_BACKENDS
from leyden.models.mixers.lightning_backends import LIGHTNING_BACKENDS, LightningCall
from torch import Tensor

# `auto` is one of the others.
BACKENDS = [name for name in LIGHTNING_BACKENDS if name != "auto"]
OF_DELTA = [name for name in DELTA_BACKENDS if name not in ("auto", "fla")]  # fla runs on a GPU alone


class PlainBackend:
    """Walks the rows one after another, prompts and decode rows alike; with a ring, drafts as well."""

    name = "plain"
    replays = False
    prompts_in_graphs = True

    def __init__(self, kernels: Kernels, *, speculative: bool = False) -> None:
        self._ops = kernels.lightning
        self.ring_size = 16 if speculative else 0

    def forward(self, call: LightningCall) -> Tensor:
        batch = call.batch
        inputs = (call.q, call.k, call.v, call.slopes, call.scale, call.state)
        for part in (batch.prompts, batch.decodes):
            if part:
                self._ops.seg_la(*inputs, part.rows, call.out)
        if batch.drafts:
            self._ops.verify(*inputs, call.ring(batch.drafts), batch.drafts.rows, call.out)
        return call.out


def follows_protocol(kernels: Kernels) -> LinearBackend[LightningCall]:
    """For mypy: the class is a backend."""
    return PlainBackend(kernels)
