"""How a layer's attention is computed: linear backends by the name in the YAML, and paged softmax attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..kernels import Kernels
from .forward_batch import ForwardBatch


class LinearAttentionBackend(Protocol):
    """Lightning attention for all rows of a batch."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        batch: ForwardBatch,
        out: Tensor,
    ) -> Tensor:
        """q, k [T, H, K], v, out [T, H, V]; state [num_slots, H, K, V], one layer of the pool, updated in place for the
        slots of the batch. Returns `out`."""


class MinimaxBackend:
    """Prefill parallel over the blocks of all prompts at once, decode by its own kernel.

    Best for few heads and long prompts: a single prompt still fills the device.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        batch: ForwardBatch,
        out: Tensor,
    ) -> Tensor:
        rows, tokens = batch.num_prefills, batch.num_prefill_tokens
        if rows:
            self.kernels.lightning_prefill(
                q[:tokens],
                k[:tokens],
                v[:tokens],
                slopes,
                scale,
                state,
                batch.state_indices[:rows],
                batch.has_initial_state[:rows],
                batch.query_start_loc[: rows + 1],
                batch.max_query_len,
                out[:tokens],
            )
        if batch.num_decodes:
            self.kernels.lightning_decode(
                q[tokens:],
                k[tokens:],
                v[tokens:],
                slopes,
                scale,
                state,
                batch.state_indices[rows:],
                batch.has_initial_state[rows:],
                out[tokens:],
            )
        return out


class SegLaBackend:
    """One launch walks every row, prefill and decode alike, with the state in registers. Best for many rows."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        batch: ForwardBatch,
        out: Tensor,
    ) -> Tensor:
        return self.kernels.lightning_segments(
            q,
            k,
            v,
            slopes,
            scale,
            state,
            batch.state_indices,
            batch.has_initial_state,
            batch.query_start_loc,
            batch.max_query_len,
            out,
        )


class AutoBackend:
    """Picks by shape. First rule: decode steps and few long prompts go to minimax, everything else to seg_la.

    seg_la has rows x heads programs that run one after another through their segment, so it starves the device when
    both are few and the segment is long.
    """

    MIN_PARALLEL = 64  # rows x heads that keep a large GPU busy
    LONG_PROMPT = 1024

    def __init__(self, kernels: Kernels) -> None:
        self.minimax = MinimaxBackend(kernels)
        self.seg_la = SegLaBackend(kernels)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        batch: ForwardBatch,
        out: Tensor,
    ) -> Tensor:
        starved = batch.num_prefills * q.shape[1] < self.MIN_PARALLEL and batch.max_query_len >= self.LONG_PROMPT
        chosen = self.minimax if starved or batch.num_prefills == 0 else self.seg_la
        return chosen.forward(q, k, v, slopes, scale, state, batch, out)


LINEAR_BACKENDS: dict[str, Callable[[Kernels], LinearAttentionBackend]] = {
    "minimax": MinimaxBackend,
    "seg_la": SegLaBackend,
    "auto": AutoBackend,
}


class FullAttentionBackend:
    """Softmax attention over the paged KV cache: store this step's keys and values, then attend."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: tuple[Tensor, Tensor],
        scale: float,
        batch: ForwardBatch,
        out: Tensor,
    ) -> Tensor:
        """q, out [T, H, D]; k, v [T, H_kv, D]; cache: key and value [num_blocks, block_size, H_kv, D], written in place
        at `batch.slot_mapping`. Returns `out`."""
        key_cache, value_cache = cache
        self.kernels.store_kv(k, v, key_cache, value_cache, batch.slot_mapping)
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
