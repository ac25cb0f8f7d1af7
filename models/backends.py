"""How a layer's attention is computed: linear backends by the name in the YAML, and paged softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..kernels import Kernels
from .forward_batch import ForwardBatch


class LinearState(NamedTuple):
    """One lightning layer's part of the state pool."""

    state: Tensor  # [num_slots, H, K, V]
    key_ring: Tensor  # [num_slots, H, C, K], the last keys that the state does not hold yet; C = 0 unless replayed
    value_ring: Tensor  # [num_slots, H, C, V]


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
    """Lightning attention for all rows of a batch. `ring_size` is C of `LinearState`, 0 for none."""

    ring_size: int

    def forward(self, call: LightningCall) -> Tensor:
        """Fills and returns `call.out`."""


class MinimaxBackend:
    """Prefill parallel over chunks of all prompts at once, decode by its own kernel.

    Best for few heads and long prompts: a single prompt still fills the device.
    """

    ring_size = 0

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def forward(self, call: LightningCall) -> Tensor:
        if call.batch.num_prefills:
            self.prefill(call)
        if call.batch.num_decodes:
            self.decode(call)
        return call.out

    def prefill(self, call: LightningCall) -> None:
        """The prefill rows alone."""
        self.kernels.lightning_prefill(*_prefill_arguments(call))

    def decode(self, call: LightningCall) -> None:
        """The decode rows alone."""
        inputs, slots, continues, out = _decode_parts(call)
        self.kernels.lightning_decode(*inputs, call.state.state, slots, continues, out)


class SegLaBackend:
    """One launch walks every row, prefill and decode alike, with the state in registers. Best for many rows."""

    ring_size = 0

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def forward(self, call: LightningCall) -> Tensor:
        batch = call.batch
        rows = (batch.state_indices, batch.has_initial_state, batch.query_start_loc)
        return self.kernels.lightning_segments(*call[:5], call.state.state, *rows, batch.max_query_len, call.out)


class ReplayBackend(MinimaxBackend):
    """Decode that seldom writes the state: the last tokens wait in a ring per slot, and are folded into the state when
    it is full. The fastest there is, for an eighth more memory per float32 state.

    Prompts go to seg_la, but a few long ones of few heads to minimax: seg_la walks a row from end to end, so rows x
    heads is all it has to fill a device with; minimax cuts long rows up, but reads keys and values twice. On an H100
    (`docs/kernels.md`) they meet at about 40 long rows x heads.

    A row that brings several tokens after it has decoded is folded first. Today's scheduler makes none; drafts will.
    """

    ring_size = 16
    MIN_PARALLEL = 40  # long rows x heads
    LONG_PROMPT = 1024  # tokens; shorter ones are over before a second launch would help

    def prefill(self, call: LightningCall) -> None:
        batch, rows = call.batch, slice(call.batch.num_prefills)
        if batch.prefills_pending:
            waiting = (batch.state_indices[rows], batch.has_initial_state[rows], batch.num_pending[rows])
            self.kernels.lightning_fold(call.slopes, *call.state, *waiting)
        longest = batch.max_query_len
        long_rows = batch.num_prefill_tokens / longest  # as many as the tokens would make
        if long_rows * call.q.shape[1] < self.MIN_PARALLEL and longest >= self.LONG_PROMPT:
            super().prefill(call)
        else:
            self.kernels.lightning_segments(*_prefill_arguments(call))

    def decode(self, call: LightningCall) -> None:
        inputs, slots, continues, out = _decode_parts(call)
        pending = call.batch.num_pending[call.batch.num_prefills :]
        self.kernels.lightning_replay(*inputs, *call.state, slots, continues, pending, out)


def _prefill_arguments(call: LightningCall) -> tuple[Any, ...]:
    """What `lightning_prefill` and `lightning_segments` take, for the prefill rows."""
    batch, t, rows = call.batch, call.batch.num_prefill_tokens, call.batch.num_prefills
    inputs = (call.q[:t], call.k[:t], call.v[:t], call.slopes, call.scale, call.state.state)
    starts = batch.query_start_loc[: rows + 1]
    return (
        *inputs,
        batch.state_indices[:rows],
        batch.has_initial_state[:rows],
        starts,
        batch.max_query_len,
        call.out[:t],
    )


def _decode_parts(call: LightningCall) -> tuple[Inputs, Tensor, Tensor, Tensor]:
    """(q, k, v, slopes, scale), state_indices, has_initial_state and out of the decode rows."""
    batch, t, rows = call.batch, call.batch.num_prefill_tokens, call.batch.num_prefills
    inputs = (call.q[t:], call.k[t:], call.v[t:], call.slopes, call.scale)
    return inputs, batch.state_indices[rows:], batch.has_initial_state[rows:], call.out[t:]


LINEAR_BACKENDS: dict[str, Callable[[Kernels], LinearAttentionBackend]] = {
    "minimax": MinimaxBackend,
    "seg_la": SegLaBackend,
    "replay": ReplayBackend,
    "auto": ReplayBackend,  # what the measurements favour, for prompts by shape and for decode
}


class FullAttentionBackend:
    """Softmax attention over the paged KV cache: rotate, store this step's keys and values, then attend."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, Tensor],
        cos_sin: Tensor,
        scale: float,
        batch: ForwardBatch,
        out: Tensor,
    ) -> Tensor:
        """q, out [T, H, D], q rotated in place; k, v [T, H_kv, D], k is scratch; cache: key and value
        [num_blocks, block_size, H_kv, D], written in place at `batch.slot_mapping`; cos_sin: [max_positions, R]
        float32. Returns `out`."""
        key_cache, value_cache = cache
        self.kernels.rope_and_store_kv(q, k, v, batch.positions, cos_sin, key_cache, value_cache, batch.slot_mapping)
        rows, tokens = batch.num_prefills, batch.num_prefill_tokens
        if rows:
            self.kernels.attention_prefill(
                q[:tokens],
                key_cache,
                value_cache,
                batch.block_table[:rows],
                batch.query_start_loc[: rows + 1],
                batch.context_lens[:rows],
                batch.max_query_len,
                scale,
                out[:tokens],
            )
        if batch.num_decodes:
            self.kernels.attention_decode(
                q[tokens:],
                key_cache,
                value_cache,
                batch.block_table[rows:],
                batch.context_lens[rows:],
                scale,
                out[tokens:],
            )
        return out
