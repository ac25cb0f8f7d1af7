"""Softmax attention over a paged cache of keys and values."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..bundles import HeadNorm, Rows


class Attention(Protocol):
    """Common to all: q, out: [T, H, D], H a multiple of H_kv; key_cache, value_cache: [num_blocks, block_size, H_kv,
    D]; all of one dtype, float32, bfloat16 or float16."""

    def rope_(self, q: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, norm: HeadNorm | None = None) -> None:
        """Norm each head of queries and keys, then rotate it by its token's position, both in place.

        key: [T, H_kv, D]. Token t turns by positions[t] in its first R <= D channels, NeoX pairs (j, j + R/2); the
        others are normed alone, and without `norm` they stay bit for bit. positions: [T] int64, below max_positions,
        those of padding too; cos_sin: [max_positions, R] float32, cosines of the R/2 angles, then their sines. Computed
        in float32, rounded once.
        """

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
        norm: HeadNorm | None = None,
    ) -> None:
        """`rope_`, and scatter keys and values into the paged caches.

        value: [T, H_kv, D], only read; slot_mapping: [T] int64, block * block_size + offset, no slot twice. q is
        changed in place as by `rope_`; key is scratch: it may hold its old or its new content afterwards. Only the
        slots named are written. Slot -1 = padding: nothing is stored, but q is rotated all the same.
        """

    def prefill(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        rows: Rows,
        context_lens: Tensor,
        scale: float,
        out: Tensor,
    ) -> Tensor:
        """Causal attention of rows of queries over their own history, which is already in the cache.

        This step's keys and values are in the caches too. context_lens: [B] int32, tokens before this step: token i of
        row b sees context_lens[b] + i + 1 positions, whose blocks are block_table[rows.slots[b]]; block_table: [S, M]
        int32, entries past the end of a row are never read. context_lens -1 = padding row: it sees nothing, writes
        zeros, and its slot may be -1. `rows.continues` is not read. Returns `out`.
        """

    def decode(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        rows: Rows,
        context_lens: Tensor,
        scale: float,
        out: Tensor,
    ) -> Tensor:
        """Rows of one query: q, out [B, H, D]; the rest as in `prefill`. Returns `out`."""
