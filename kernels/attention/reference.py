"""Softmax attention over a paged KV cache in plain PyTorch. A CPU serves with it, and tests compare with it.

Index tensors are read on the host, which costs nothing where they live on the CPU. Only positions that a row sees are
loaded from the cache: the other places of a block may hold stale values, or NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundles import HeadNorm, Rows

LONGEST_PADDED = 256  # tokens of history up to which decode rows are padded to one batch


def token_rows(cache: Tensor) -> Tensor:
    """[num_blocks, block_size, H_kv, D] -> [num_blocks * block_size, H_kv, D], always a view."""
    return cache.view(-1, *cache.shape[2:])


def prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    rows: Rows,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Row by row. Contract: `Attention.prefill`."""
    starts, slots = rows.starts.tolist(), rows.slots.tolist()
    for row, context in enumerate(context_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        if context < 0:  # padding row
            out[start:end] = 0
        if start == end or context < 0:
            continue
        blocks, length = block_table[slots[row]], context + end - start
        keys, values = (_history(cache, blocks, length) for cache in (key_cache, value_cache))
        mask = None
        if context:
            mask = torch.ones(end - start, length, dtype=torch.bool, device=q.device).tril_(context)
        # [H, n, D], [H_kv, L, D] -> [H, n, D]; a leading batch of 1 selects the fused kernel
        attended = F.scaled_dot_product_attention(
            q[None, start:end].transpose(1, 2),
            keys[None].transpose(1, 2),
            values[None].transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        out[start:end] = attended[0].transpose(0, 1)
    return out


def _history(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` tokens of one row: [L, H_kv, D]."""
    block_size = cache.shape[1]
    return cache.index_select(0, blocks[: -(-length // block_size)]).flatten(0, 1)[:length]


def decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    rows: Rows,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Contract: `Attention.decode`. A row with context_lens = -1 sees nothing and writes zeros.

    Short histories are padded to one batch; long ones go row by row, where a copy of padding would cost more
    than a call.
    """
    lengths = [n + 1 for n in context_lens.tolist()]
    if len(lengths) > 1 and max(lengths) <= LONGEST_PADDED:
        return _decode_padded(
            q, key_cache, value_cache, block_table, rows.slots, context_lens, max(lengths), scale, out
        )
    for row, (length, slot) in enumerate(zip(lengths, rows.slots.tolist(), strict=True)):
        if length == 0:
            out[row].zero_()
            continue
        blocks = block_table[slot]
        keys, values = (_history(cache, blocks, length)[None] for cache in (key_cache, value_cache))
        out[row] = _attend_once(q[row, None], keys, values, None, scale)[0]
    return out


def _attend_once(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One query per row, q [B, H, D], keys, values [B, L, H_kv, D], mask [B, 1, 1, L] or None -> [B, H, D].

    The group of query heads that shares a kv head stands where a sequence would, so nothing is repeated.
    """
    num_kv_heads, head_dim = keys.shape[2:]
    grouped = q.reshape(len(q), num_kv_heads, -1, head_dim)
    # [B, H_kv, G, D], [B, H_kv, L, D] -> [B, H_kv, G, D]
    rows = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return rows.reshape(q.shape)


def _decode_padded(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    context_lens: Tensor,
    longest: int,
    scale: float,
    out: Tensor,
) -> Tensor:
    if longest == 0:
        return out.zero_()
    width = -(-longest // key_cache.shape[1])  # cut first: a table may be far wider than these rows are long
    blocks = block_table[:, :width].index_select(0, slots.clamp(min=0)) * (context_lens >= 0)[:, None]
    tokens, mask = _visible_tokens(blocks, context_lens, key_cache.shape[1], longest)
    keys, values = (
        token_rows(cache).index_select(0, tokens).view(len(q), longest, *cache.shape[2:])
        for cache in (key_cache, value_cache)
    )
    out.copy_(_attend_once(q, keys, values, mask, scale))
    return out.masked_fill_((context_lens < 0)[:, None, None], 0.0)


def _visible_tokens(blocks: Tensor, context_lens: Tensor, block_size: int, longest: int) -> tuple[Tensor, Tensor]:
    """Cache rows of positions 0..longest-1 of every row, [B * L], and which of them it sees, [B, 1, 1, L].
    blocks: [B, M] int32.

    A position that a row does not see stands for its position 0.
    """
    position = torch.arange(longest, device=blocks.device)
    seen = position <= context_lens[:, None]  # [B, L]
    position = position * seen
    tokens = blocks.long().gather(1, position // block_size) * block_size + position % block_size
    return tokens.view(-1), seen[:, None, None, :]


def rope_(q: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, norm: HeadNorm | None = None) -> None:
    """q [T, H, D], key [T, H_kv, D] in place. Contract: `Attention.rope_`."""
    cos, sin = cos_sin.index_select(0, positions)[:, None, :].chunk(2, dim=-1)  # [T, 1, R/2] each
    if norm is None:
        _rotate(q, cos, sin)
        _rotate(key, cos, sin)
        return
    for x, weight in ((q, norm.query), (key, norm.key)):
        normed = F.rms_norm(x.float(), weight.shape, weight.float(), norm.eps)
        _rotate(normed, cos, sin)
        x.copy_(normed)


def rope_and_store_kv(
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
    """Rotates key in place on its way. Contract: `Attention.rope_and_store_kv`."""
    rope_(q, key, positions, cos_sin, norm)
    if -1 in slot_mapping.tolist():
        real = (slot_mapping >= 0).nonzero()[:, 0]
        key, value, slot_mapping = key[real], value[real], slot_mapping[real]
    token_rows(key_cache).index_copy_(0, slot_mapping, key)
    token_rows(value_cache).index_copy_(0, slot_mapping, value)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn channel pairs (j, j + R/2) of x [T, H, D] in place (Su et al. 2021); cos, sin: [T, 1, R/2] float32."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = torch.addcmul(first * cos, second, sin, value=-1.0)
    second.copy_(torch.addcmul(second * cos, first, sin))
    first.copy_(rotated)
