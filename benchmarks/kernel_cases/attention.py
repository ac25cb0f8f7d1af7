"""Softmax attention over a paged cache."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from leyden.benchmarks.kernel_cases import base
from leyden.benchmarks.kernel_cases.base import Bound, Implementation, Work, generator, normal
from leyden.kernels.bundles import Rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class AttentionInputs:
    q: Tensor  # [T, H, D]
    caches: tuple[Tensor, Tensor]  # keys, values [num_blocks, 16, H_kv, D]
    block_table: Tensor
    rows: Rows
    context_lens: Tensor
    out: Tensor

    def history(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one row, [L, H_kv, D]."""
        keys, values = (cache[self.block_table[row]].flatten(0, 1) for cache in self.caches)
        return keys, values


@dataclass(frozen=True)
class AttentionCase:
    """Rows of `length` positions, of which each queries the last one (decode) or all (prefill)."""

    is_prefill: bool
    num_rows: int
    length: int
    head_dim: int
    heads: int = 32
    kv_heads: int = 8
    block_size: int = 16
    num_steps: int = 1

    @property
    def group(self) -> str:
        return "attention-prefill" if self.is_prefill else "attention-decode"

    @property
    def label(self) -> str:
        return f"{self.num_rows} x {self.length}, D={self.head_dim}"

    @property
    def name(self) -> str:
        return f"{self.group}/d{self.head_dim}/{self.num_rows}x{self.length}"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def checked_heads(self) -> list[int]:
        """A prefill's float64 scores are n x n per head."""
        return [0, self.heads // 2 + 1, self.heads - 1] if self.is_prefill else list(range(self.heads))

    def inputs(self, seed: int, *, checked: bool) -> AttentionInputs:
        blocks = self.length // self.block_size
        queries = self.length if self.is_prefill else 1
        cache = (self.num_rows * blocks, self.block_size, self.kv_heads, self.head_dim)
        order = torch.randperm(cache[0], generator=generator(seed), device=base.DEVICE)
        index = torch.arange(self.num_rows + 1, device=base.DEVICE, dtype=torch.int32)
        context = torch.full_like(index[:-1], self.length - queries)
        q = normal(seed, self.num_rows * queries, self.heads, self.head_dim)
        return AttentionInputs(
            q,
            (normal(seed + 1, *cache), normal(seed + 2, *cache)),
            order.view(self.num_rows, blocks).int(),
            Rows(index[:-1], context > 0, index * queries, queries),
            context,
            torch.full_like(q, math.nan),
        )

    def work(self, inputs: AttentionInputs | None = None) -> Work:
        key_bytes = self.num_rows * self.length * self.kv_heads * self.head_dim * 2
        if not self.is_prefill:
            return Work(2 * key_bytes)
        query_bytes = key_bytes * self.heads // self.kv_heads
        pairs = self.num_rows * self.length * (self.length + 1) // 2
        return Work(2 * key_bytes + 2 * query_bytes, 4 * pairs * self.heads * self.head_dim)

    def expected(self, inputs: AttentionInputs) -> dict[str, Tensor]:
        rows = []
        for row, q in enumerate(inputs.q.view(self.num_rows, -1, self.heads, self.head_dim)):
            keys, values = inputs.history(row)
            group = self.heads // self.kv_heads
            heads = [self._one_head(q[:, h], keys[:, h // group], values[:, h // group]) for h in self.checked_heads]
            rows.append(torch.stack(heads, dim=1))
        return {"out": torch.cat(rows)}

    def _one_head(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        score = q.double() @ keys.double().mT * self.scale
        if self.is_prefill:
            score.masked_fill_(torch.ones_like(score, dtype=torch.bool).triu_(1), -math.inf)
        return score.softmax(dim=-1) @ values.double()

    def implementations(self) -> dict[str, Implementation]:
        if not self.is_prefill:
            return {"leyden": Implementation(self.bind_decode)}
        flash = functools.partial(self.bind_sdpa, SDPBackend.FLASH_ATTENTION)
        cudnn = functools.partial(self.bind_sdpa, SDPBackend.CUDNN_ATTENTION)
        return {
            "leyden": Implementation(self.bind_prefill),
            "torch flash": Implementation(flash, is_peer=True),
            "torch cudnn": Implementation(cudnn, is_peer=True),
        }

    def bind_decode(self, x: AttentionInputs) -> Bound:
        kernels = base.our_kernels()

        def step(_: int) -> None:
            kernels.attention.decode(x.q, *x.caches, x.block_table, x.rows, x.context_lens, self.scale, x.out)

        return Bound(step, lambda: (x.out,))

    def bind_prefill(self, x: AttentionInputs) -> Bound:
        kernels = base.our_kernels()

        def step(_: int) -> None:
            kernels.attention.prefill(x.q, *x.caches, x.block_table, x.rows, x.context_lens, self.scale, x.out)

        return Bound(step, lambda: (x.out[:, self.checked_heads],))

    def bind_sdpa(self, backend: SDPBackend, x: AttentionInputs) -> Bound:
        """On contiguous keys and values, [rows, H_kv, L, D] in the layout that flash attention likes."""
        shape = (self.num_rows, self.length, self.kv_heads, self.head_dim)
        k, v = (cache[x.block_table].view(shape).transpose(1, 2) for cache in x.caches)
        q = x.q.view(self.num_rows, self.length, self.heads, self.head_dim).transpose(1, 2)
        kept: list[Tensor] = []

        def step(_: int) -> None:
            with sdpa_kernel(backend):
                kept[:] = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)]

        return Bound(step, lambda: (kept[0].transpose(1, 2).flatten(0, 1)[:, self.checked_heads],))
