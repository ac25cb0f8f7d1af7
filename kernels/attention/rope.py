"""Partial rotary embedding (Su et al. 2021) of a step's queries and keys; the keys go on into the paged cache, and the
values with them.

NeoX layout: channel j turns with channel j + R/2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(p_x, p_y, b_cos, b_sin, o_h, H, x_h, y_h, HALF: tl.constexpr, BR: tl.constexpr):
    """The first 2 * HALF channels of heads o_h [BH] below H, from p_x to p_y, which may be the same."""
    o_r = tl.arange(0, BR)
    m_x = (o_h < H)[:, None] & (o_r < HALF)[None, :]
    p_x += o_h[:, None] * x_h + o_r[None, :]
    p_y += o_h[:, None] * y_h + o_r[None, :]
    b_first = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    b_second = tl.load(p_x + HALF, mask=m_x, other=0.0).to(tl.float32)
    b_1 = b_first * b_cos[None, :] - b_second * b_sin[None, :]
    b_2 = b_second * b_cos[None, :] + b_first * b_sin[None, :]
    tl.store(p_y, b_1.to(p_y.dtype.element_ty), mask=m_x)
    tl.store(p_y + HALF, b_2.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit
def _copy_channels(p_x, p_y, o_h, H, x_h, y_h, FIRST: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Channels from FIRST on of heads o_h [BH] below H."""
    o_d = tl.arange(0, BD)
    m = (o_h < H)[:, None] & ((o_d >= FIRST) & (o_d < D))[None, :]
    b_x = tl.load(p_x + o_h[:, None] * x_h + o_d[None, :], mask=m)
    tl.store(p_y + o_h[:, None] * y_h + o_d[None, :], b_x, mask=m)


@triton.jit(do_not_specialize_on_alignment=["p_positions", "p_slots"])
def _rope_store_kernel(
    p_q,
    p_key,
    p_value,
    p_positions,
    p_cos_sin,
    p_key_cache,
    p_value_cache,
    p_slots,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    c_p,
    kc_b,
    kc_t,
    kc_h,
    vc_b,
    vc_t,
    vc_h,
    BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """A program handles BH heads of one token: q's first, then those of key and value."""
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_h, o_r = tl.arange(0, BH), tl.arange(0, BR)
    slot = tl.load(p_slots + i_t)
    p_cos_sin += tl.load(p_positions + i_t) * c_p
    b_cos = tl.load(p_cos_sin + o_r, mask=o_r < HALF, other=0.0)
    b_sin = tl.load(p_cos_sin + HALF + o_r, mask=o_r < HALF, other=0.0)
    q_parts = tl.cdiv(H, BH)
    if i_h < q_parts:
        p_q += i_t * q_t
        _rotate(p_q, p_q, b_cos, b_sin, i_h * BH + o_h, H, q_h, q_h, HALF, BR)
    elif slot >= 0:
        o_h += (i_h - q_parts) * BH
        p_key += i_t * k_t
        p_key_cache += slot // BLOCK_SIZE * kc_b + slot % BLOCK_SIZE * kc_t
        p_value_cache += slot // BLOCK_SIZE * vc_b + slot % BLOCK_SIZE * vc_t
        _rotate(p_key, p_key_cache, b_cos, b_sin, o_h, H_KV, k_h, kc_h, HALF, BR)
        if 2 * HALF < D:
            _copy_channels(p_key, p_key_cache, o_h, H_KV, k_h, kc_h, 2 * HALF, D, BD)
        _copy_channels(p_value + i_t * v_t, p_value_cache, o_h, H_KV, v_h, vc_h, 0, D, BD)


def rope_and_store_kv(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """q [T, H, D] in place; key, value [T, H_kv, D] into the caches. Contract: `Attention.rope_and_store_kv`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = key.shape[1]
    half = cos_sin.shape[1] // 2
    if num_tokens == 0:
        return
    BH = min(16, triton.next_power_of_2(num_heads))
    parts = triton.cdiv(num_heads, BH) + triton.cdiv(num_kv_heads, BH)
    _rope_store_kernel[(num_tokens, parts)](
        q,
        key,
        value,
        positions,
        cos_sin,
        key_cache,
        value_cache,
        slot_mapping,
        *q.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        cos_sin.stride(0),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        BLOCK_SIZE=key_cache.shape[1],
        H=num_heads,
        H_KV=num_kv_heads,
        D=head_dim,
        HALF=half,
        BH=BH,
        BD=triton.next_power_of_2(head_dim),
        BR=triton.next_power_of_2(half),
        num_warps=4,
    )
