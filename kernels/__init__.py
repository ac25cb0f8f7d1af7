"""Tensors in, tensors out: the operations of a hybrid linear-attention model.

`Kernels` is the contract. Two modules satisfy it: `torch_ops` (plain PyTorch, any device, what a CPU serves
with) and `triton_ops` (Triton kernels: CUDA, or CPU tensors under `TRITON_INTERPRET=1`). A model receives one
of them and never asks which. Nothing here knows of layers, requests or configuration.

Shapes use the letters of the field: T tokens on the flat axis, B rows (one per sequence in the step), H
heads, K and V the head dims of keys and values, D the head dim of softmax attention, d the hidden size, F the
MLP width, E experts.
"""

from __future__ import annotations

from typing import Literal, Protocol, cast

import torch
from torch import Tensor

KernelName = Literal["torch", "triton"]


class Kernels(Protocol):
    """What every implementation offers. Last dims are contiguous, leading strides are free.

    No function reads a device value on the host, so none synchronises; sizes that a launch needs
    (`max_query_len`) come in as ints.
    """

    # -- lightning attention: S_t = e^{-s} S_{t-1} + k_t v_t^T,  o_t = scale * q_t S_t -----------------------

    def lightning_prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        state_indices: Tensor,
        has_initial_state: Tensor,
        query_start_loc: Tensor,
        max_query_len: int,
        out: Tensor,
    ) -> Tensor:
        """Block-parallel varlen lightning attention (`minimax`).

        q, k: [T, H, K]; v, out: [T, H, V]; float32, bfloat16 or float16, strided views allowed; slopes: [H]
        float32, positive; state: [num_slots, H, K, V], updated in place for the B slots named, others
        untouched bit for bit; state_indices: [B] int32, -1 = padding row (writes zeros to its output, nothing
        to the pool); has_initial_state: [B] bool, False = the slot's content is ignored;
        query_start_loc: [B + 1] int32, row b owns tokens query_start_loc[b] up to query_start_loc[b + 1];
        max_query_len: longest row. Returns `out`.
        """

    def lightning_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        state_indices: Tensor,
        has_initial_state: Tensor,
        out: Tensor,
    ) -> Tensor:
        """One token per row: q, k [B, H, K], v, out [B, H, V]; the rest as in `lightning_prefill`."""

    def lightning_segments(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        state_indices: Tensor,
        has_initial_state: Tensor,
        query_start_loc: Tensor,
        max_query_len: int,
        out: Tensor,
    ) -> Tensor:
        """Fused segment walk (`seg_la`): prefill and decode rows in one launch. Same contract as
        `lightning_prefill`."""

    def lightning_snapshot(
        self,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        state: Tensor,
        state_indices: Tensor,
        has_initial_state: Tensor,
        query_start_loc: Tensor,
        snapshots: Tensor,
        pool: Tensor,
    ) -> None:
        """Save states that rows are about to pass in `lightning_prefill` or `lightning_segments`, which come after it.

        snapshots: [S, 3] int32, each (b, n, c): the state after the first n >= 1 tokens of row b goes to
        pool[c]; c = -1 = padding, of which nothing else is read. No c comes twice, and row b is no padding.
        pool: [N, H, K, V] in any float dtype. `state` is read only; the other arguments as in
        `lightning_prefill`.
        """

    def lightning_replay(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        key_ring: Tensor,
        value_ring: Tensor,
        state_indices: Tensor,
        has_initial_state: Tensor,
        num_pending: Tensor,
        out: Tensor,
    ) -> Tensor:
        """`lightning_decode` that writes the state once per C tokens.

        key_ring: [num_slots, H, C, K], value_ring: [num_slots, H, C, V], C a power of two, contiguous but for the
        slots' stride, in any float dtype, updated in place: the last tokens of each slot that its state does not
        hold yet; num_pending: [B] int32, how many of them wait, 0 .. C, oldest first. The token is appended; where
        that makes C or more, or the row is new, all are folded into the state, and the caller's count must return to
        0, otherwise it goes up by one. The rest as in `lightning_decode`.
        """

    def lightning_verify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        key_ring: Tensor,
        value_ring: Tensor,
        state_indices: Tensor,
        has_initial_state: Tensor,
        num_pending: Tensor,
        query_start_loc: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Rows of a few tokens, of which perhaps only the first will be kept: the state is read, never written.

        A row's m tokens see the state, the p = num_pending[b] tokens that wait in the ring, and each other, and are
        left in the ring at places p .. p + m - 1; p + m <= C is the caller's duty. Its next num_pending says how many
        are kept; those behind are overwritten. Without an initial state p counts as 0, and neither state nor ring is
        read. Tokens and rows as in `lightning_prefill` (padding rows may be of any length), rings as in
        `lightning_replay`. Returns `out`.
        """

    def lightning_fold(
        self,
        slopes: Tensor,
        state: Tensor,
        key_ring: Tensor,
        value_ring: Tensor,
        state_indices: Tensor,
        has_initial_state: Tensor,
        num_pending: Tensor,
    ) -> None:
        """Fold the waiting tokens into the state, in place; afterwards none wait. Arguments as in
        `lightning_replay`; padding rows and rows without an initial state are left alone."""

    # -- softmax attention over a paged KV cache -------------------------------------------------------------

    def rope_and_store_kv(
        self,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Rotate queries and keys by their positions, and scatter keys and values into the paged caches.

        q: [T, H, D]; key, value: [T, H_kv, D]; key_cache, value_cache: [num_blocks, block_size, H_kv, D]; all of one
        dtype, float32, bfloat16 or float16. Token t turns by positions[t] in its first R <= D channels, NeoX pairs
        (j, j + R/2); the others stay bit for bit. positions: [T] int64, below max_positions; cos_sin:
        [max_positions, R] float32, cosines of the R/2 angles, then their sines; slot_mapping: [T] int64, block *
        block_size + offset, no slot twice.

        q is rotated in place, value only read; key is scratch: it may hold either afterwards. Only the slots named are
        written. Slot -1 = padding: nothing is stored, but q is rotated all the same, so its position must be valid.
        """

    def attention_prefill(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        table_rows: Tensor,
        query_start_loc: Tensor,
        context_lens: Tensor,
        max_query_len: int,
        scale: float,
        out: Tensor,
    ) -> Tensor:
        """Causal GQA attention of rows of queries over their own history, which is already in the cache.

        q, out: [T, H, D], H a multiple of H_kv; caches as in `rope_and_store_kv`, this step's keys and values
        included; context_lens: [B] int32, tokens before this step: token i of row b sees context_lens[b] + i + 1
        positions, whose blocks are block_table[table_rows[b]]; block_table: [S, M] int32, what lies past the end of
        such a row is never read; table_rows: [B] int32. context_lens -1 = padding row: sees nothing, writes zeros,
        and its table_rows may be -1. Returns `out`.
        """

    def attention_decode(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        table_rows: Tensor,
        context_lens: Tensor,
        scale: float,
        out: Tensor,
    ) -> Tensor:
        """One query per row: q, out [B, H, D]; row b sees context_lens[b] + 1 positions, whose blocks are
        block_table[table_rows[b]], as in `attention_prefill`.

        context_lens -1 = padding row: sees nothing, writes zeros. Returns `out`.
        """

    # -- around attention ------------------------------------------------------------------------------------

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [T, in] @ weight [out, in]^T -> [T, out], of one dtype, sums in float32; x contiguous."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., d] / sqrt(mean(x^2) + eps) * weight [d], statistics in float32, in x's dtype."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, alpha: float, beta: float
    ) -> tuple[Tensor, Tensor]:
        """h = alpha * residual + beta * x; returns (rms_norm(h), h). x, residual: [T, d]."""

    def gated_rms_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float, num_groups: int = 1) -> Tensor:
        """rms_norm(x) * sigmoid(gate), rounded once; x, gate: [T, W], weight: [W].

        The norm is over each of `num_groups` equal parts of the last dim.
        """

    def silu_(self, x: Tensor) -> Tensor:
        """x * sigmoid(x), in place; x: [T, W]. Returns x."""

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """x [T, 2F] = [gate | up] -> silu(gate) * up, [T, F]."""

    def route(self, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The softmax over all experts, its k largest renormalised to a sum of 1; of equal ones any.

        logits: [T, E] float32. Returns weights [T, k] float32, largest first, and experts [T, k] int64.
        """

    def moe(self, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum over the chosen experts of weight * down(silu(gate x) * up x).

        x: [T, d]; gate_up: [E, 2F, d], gate rows first; down: [E, d, F]; weights: [T, k] float32;
        experts: [T, k] int64. Returns [T, d] in x's dtype.
        """

    # -- after the last layer --------------------------------------------------------------------------------

    def sample(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor:
        """The next token of each row; a row knows no other.

        logits: [N, V], float32, bfloat16 or float16; all others [N], float32, but top_k int32. temperature 0 takes the
        largest logit, of equal ones the first. Otherwise p = softmax(logits / temperature); kept are the tokens with p
        of at least min_p of the largest, then the top_k most likely (0 = all), then the fewest of these, in descending
        order, whose share reaches top_p (1 = all); tokens as likely as the last kept one are kept too. The token drawn
        is the first, in the order of the vocabulary, at which the share of the kept ones exceeds uniform in [0, 1).

        Returns [N] int32; -1 where a logit is NaN or +inf, or all are -inf.
        """


def load(name: KernelName) -> Kernels:
    """The implementation called `name`. Triton is imported only when asked for."""
    if name == "triton":
        from . import triton_ops

        return cast(Kernels, triton_ops)
    from . import torch_ops

    return cast(Kernels, torch_ops)


def default_for(device: torch.device) -> KernelName:
    """Triton where it compiles for the device, PyTorch elsewhere."""
    return "triton" if device.type == "cuda" else "torch"


def use_device(device: torch.device) -> None:
    """Make `device` the current one of this thread. Called at the start of every thread that computes or copies.

    Triton launches on the current device, and `torch.cuda.Event().record()` takes its stream, whatever device the
    tensors are on. A thread starts with device 0. `cuda` without an index is the current one already.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
