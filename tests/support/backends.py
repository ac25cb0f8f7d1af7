"""Every linear backend, and one that knows nothing but the documented protocol."""

from __future__ import annotations

from leyden.kernels import Kernels
from leyden.models.mixers.lightning_backends import LINEAR_BACKENDS, LightningCall, LinearAttentionBackend
from torch import Tensor

BACKENDS = [name for name in LINEAR_BACKENDS if name != "auto"]  # `auto` is one of the others


class PlainBackend:
    """Walks the rows one after another, prompts and decode rows alike; with a ring, drafts as well."""

    name = "plain"
    replays = False

    def __init__(self, kernels: Kernels, *, speculative: bool = False) -> None:
        self._ops = kernels
        self.ring_size = 16 if speculative else 0

    def forward(self, call: LightningCall) -> Tensor:
        batch, (state, keys, values) = call.batch, call.state.pools
        for part in (batch.prompts, batch.decodes):
            if part.rows.stop > part.rows.start:
                rows, tokens = part
                starts = batch.query_start_loc[rows.start : rows.stop + 1] - tokens.start
                slots, is_old = batch.state_indices[rows], batch.has_initial_state[rows]
                inputs = (call.q[tokens], call.k[tokens], call.v[tokens], call.slopes, call.scale)
                longest = batch.max_query_len
                self._ops.lightning_segments(*inputs, state, slots, is_old, starts, longest, call.out[tokens])
        if batch.num_drafted:
            rows = batch.drafts.rows
            slots, is_old = batch.state_indices[rows], batch.has_initial_state[rows]
            where = (slots, is_old, batch.num_pending[rows], batch.query_start_loc[rows.start : rows.stop + 1])
            inputs = (call.q, call.k, call.v, call.slopes, call.scale)
            self._ops.lightning_verify(*inputs, state, keys, values, *where, call.out)
        return call.out


def follows_protocol(kernels: Kernels) -> LinearAttentionBackend:
    """For mypy: the class is a backend."""
    return PlainBackend(kernels)
