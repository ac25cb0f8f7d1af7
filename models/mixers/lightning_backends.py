"""How lightning attention is computed for a step: backends by their name in the YAML."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ...kernels import Kernels
from ..forward_batch import ForwardBatch


class LinearState(NamedTuple):
    """One lightning layer's part of the state pool."""

    state: Tensor  # [num_slots, H, K, V]
    key_ring: Tensor  # [num_slots, H, C, K], the last keys that the state does not hold yet; C = 0 without a ring
    value_ring: Tensor  # [num_slots, H, C, V]
    snapshots: Tensor  # [num_snapshots, H, K, V], this layer's part of the states that the prefix cache keeps

    @property
    def pools(self) -> tuple[Tensor, Tensor, Tensor]:
        """(state, key_ring, value_ring), as the kernels take them."""
        return self.state, self.key_ring, self.value_ring


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, float]  # q, k, v, slopes, scale


class LightningCall(NamedTuple):
    """What a layer asks of its backend for a step."""

    q: Tensor  # [T, H, K]
    k: Tensor  # [T, H, K]
    v: Tensor  # [T, H, V]
    slopes: Tensor  # [H] float32
    scale: float
    state: LinearState  # updated in place for the slots of the batch
    batch: ForwardBatch
    out: Tensor  # [T, H, V], written


class LinearAttentionBackend(Protocol):
    """Lightning attention for all rows of a batch. Nothing else is asked of a backend.

    `name` is that of the setting. `ring_size` is C of `LinearState`, 0 for none; without a ring there are no verify
    rows, and the engine refuses `speculative_tokens`. `replays` says that decode rows leave their tokens in the ring
    too. `ForwardBatch` tells what waits there after a step: the i-th waiting token's key and value at place i, as they
    came. The model folds them into the state by `Kernels.lightning_fold` where the next row does not read the ring.
    """

    name: str
    ring_size: int
    replays: bool

    def forward(self, call: LightningCall) -> Tensor:
        """Fills and returns `call.out`, and updates the states and rings of the batch's slots."""


class BackendFactory(Protocol):
    """An entry of `LINEAR_BACKENDS`: a backend's class, or a function that makes one."""

    def __call__(self, kernels: Kernels, *, speculative: bool = False) -> LinearAttentionBackend:
        """`speculative`: rows may bring drafts, which need a ring with room for `speculative_tokens` and two more."""


class MinimaxBackend:
    """Prefill parallel over chunks of all prompts at once, decode by its own kernel.

    Best for few heads and long prompts: a single prompt still fills the device. `speculative`: the states have rings,
    so that rows may bring drafts.
    """

    RING_SIZE = 16
    name = "minimax"
    replays = False

    def __init__(self, kernels: Kernels, *, speculative: bool = False) -> None:
        self.kernels = kernels
        self.ring_size = self.RING_SIZE if speculative or self.replays else 0

    def forward(self, call: LightningCall) -> Tensor:
        batch = call.batch
        if batch.num_prefills > batch.num_drafted:
            self.prefill(call)
        if batch.num_drafted:
            self.verify(call)
        if batch.num_decodes:
            self.decode(call)
        return call.out

    def prefill(self, call: LightningCall) -> None:
        """The prefill rows that bring no drafts."""
        self.kernels.lightning_prefill(*_prompt_arguments(call))

    def verify(self, call: LightningCall) -> None:
        """The verify rows: into the rings, not into the states."""
        batch, rows = call.batch, call.batch.drafts.rows
        starts = batch.query_start_loc[rows.start : rows.stop + 1]
        pending = batch.num_pending[rows]
        self.kernels.lightning_verify(*call[:5], *call.state.pools, *_slots(batch, rows), pending, starts, call.out)

    def decode(self, call: LightningCall) -> None:
        """The decode rows."""
        rows, tokens = call.batch.decodes
        self.kernels.lightning_decode(
            *_inputs(call, tokens), call.state.state, *_slots(call.batch, rows), call.out[tokens]
        )


class SegLaBackend(MinimaxBackend):
    """One launch walks every row, prefill and decode alike, with the state in registers. Best for many rows."""

    name = "seg_la"

    def forward(self, call: LightningCall) -> Tensor:
        batch = call.batch
        if batch.num_drafted:  # they lie between the others
            return super().forward(call)
        rows = (batch.state_indices, batch.has_initial_state, batch.query_start_loc)
        return self.kernels.lightning_segments(*call[:5], call.state.state, *rows, batch.max_query_len, call.out)

    def prefill(self, call: LightningCall) -> None:
        self.kernels.lightning_segments(*_prompt_arguments(call))


class ReplayBackend(MinimaxBackend):
    """Decode that seldom writes the state: the last tokens wait in a ring per slot, and are folded into the state when
    it is full. The fastest there is, for an eighth more memory per float32 state.

    Prompts go to seg_la, but a few long ones of few heads to minimax: seg_la walks a row from end to end, so rows x
    heads is all it has to fill a device with; minimax cuts long rows up, but reads keys and values twice. On an H100
    (`docs/kernels.md`) they meet at about 40 long rows x heads.
    """

    name = "replay"
    replays = True
    MIN_PARALLEL = 40  # long rows x heads
    LONG_PROMPT = 1024  # tokens; shorter ones are over before a second launch would help

    def prefill(self, call: LightningCall) -> None:
        tokens, longest = call.batch.prompts.tokens, call.batch.max_query_len
        long_rows = tokens.stop / longest  # as many as the tokens would make
        if long_rows * call.q.shape[1] < self.MIN_PARALLEL and longest >= self.LONG_PROMPT:
            super().prefill(call)
        else:
            self.kernels.lightning_segments(*_prompt_arguments(call))

    def decode(self, call: LightningCall) -> None:
        rows, tokens = call.batch.decodes
        pending = call.batch.num_pending[rows]
        self.kernels.lightning_replay(
            *_inputs(call, tokens), *call.state.pools, *_slots(call.batch, rows), pending, call.out[tokens]
        )


def _prompt_arguments(call: LightningCall) -> tuple[Any, ...]:
    """What `lightning_prefill` and `lightning_segments` take, for the prefill rows that bring no drafts."""
    batch, (rows, tokens) = call.batch, call.batch.prompts
    starts = batch.query_start_loc[: rows.stop + 1]
    inputs = (*_inputs(call, tokens), call.state.state, *_slots(batch, rows))
    return (*inputs, starts, batch.max_query_len, call.out[tokens])


def _inputs(call: LightningCall, tokens: slice) -> Inputs:
    """The inputs of some tokens."""
    return call.q[tokens], call.k[tokens], call.v[tokens], call.slopes, call.scale


def _slots(batch: ForwardBatch, rows: slice) -> tuple[Tensor, Tensor]:
    """state_indices and has_initial_state of some rows."""
    return batch.state_indices[rows], batch.has_initial_state[rows]


LINEAR_BACKENDS: dict[str, BackendFactory] = {
    "minimax": MinimaxBackend,
    "seg_la": SegLaBackend,
    "replay": ReplayBackend,
    "auto": ReplayBackend,  # what the measurements favour, for prompts by shape and for decode
}
