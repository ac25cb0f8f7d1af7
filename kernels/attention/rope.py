"""Partial rotary embedding (Su et al. 2021) of a step's queries and keys, after a norm of each head if there is one;
alone, or with the store of keys and values into the paged cache.

NeoX layout: channel j turns with channel j + R/2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bundles import HeadNorm

NO_NORM = (None, None, 0.0)


@triton.jit
def _rotate(
    p_x,
    p_y,
    p_w,
    eps,
    b_cos,
    b_sin,
    o_h,
    H,
    x_h,
    y_h,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """The first 2 * HALF channels of heads o_h [BH] below H, from p_x to p_y, which may be the same.

    With weights p_w [D] all D channels are normed first, and the rest of them goes to p_y, too.
    """
    o_r, o_d = tl.arange(0, BR), tl.arange(0, BD)
    m_r, m_h = o_r < HALF, o_h < H
    m_x = m_h[:, None] & m_r[None, :]
    p_first = p_x + o_h[:, None] * x_h + o_r[None, :]
    b_first = tl.load(p_first, mask=m_x, other=0.0).to(tl.float32)
    b_second = tl.load(p_first + HALF, mask=m_x, other=0.0).to(tl.float32)
    if p_w is not None:
        b_x = tl.load(p_x + o_h[:, None] * x_h + o_d[None, :], mask=m_h[:, None] & (o_d < D)[None, :], other=0.0)
        b_x = b_x.to(tl.float32)
        b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)
        b_first *= b_scale[:, None] * tl.load(p_w + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
        b_second *= b_scale[:, None] * tl.load(p_w + HALF + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
        tl.debug_barrier()  # a head is read whole before any of it is written
        if 2 * HALF < D:
            m_d = (o_d >= 2 * HALF) & (o_d < D)
            b_x *= b_scale[:, None] * tl.load(p_w + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
            p_rest = p_y + o_h[:, None] * y_h + o_d[None, :]
            tl.store(p_rest, b_x.to(p_y.dtype.element_ty), mask=m_h[:, None] & m_d[None, :])
    b_1 = b_first * b_cos[None, :] - b_second * b_sin[None, :]
    b_2 = b_second * b_cos[None, :] + b_first * b_sin[None, :]
    p_y += o_h[:, None] * y_h + o_r[None, :]
    tl.store(p_y, b_1.to(p_y.dtype.element_ty), mask=m_x)
    tl.store(p_y + HALF, b_2.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit
def _load_angles(p_cos_sin, p_positions, i_t, c_p, HALF: tl.constexpr, BR: tl.constexpr):
    """Cosines and sines [BR] of the token's position."""
    o_r = tl.arange(0, BR)
    p_cos_sin += tl.load(p_positions + i_t) * c_p
    b_cos = tl.load(p_cos_sin + o_r, mask=o_r < HALF, other=0.0)
    return b_cos, tl.load(p_cos_sin + HALF + o_r, mask=o_r < HALF, other=0.0)


@triton.jit
def _copy_channels(p_x, p_y, o_h, H, x_h, y_h, FIRST: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Channels from FIRST on of heads o_h [BH] below H."""
    o_d = tl.arange(0, BD)
    m = (o_h < H)[:, None] & ((o_d >= FIRST) & (o_d < D))[None, :]
    b_x = tl.load(p_x + o_h[:, None] * x_h + o_d[None, :], mask=m)
    tl.store(p_y + o_h[:, None] * y_h + o_d[None, :], b_x, mask=m)


@triton.jit(do_not_specialize_on_alignment=["p_positions"])
def _rope_kernel(
    p_q,
    p_key,
    p_positions,
    p_cos_sin,
    p_q_weight,
    p_key_weight,
    eps,
    q_t,
    q_h,
    k_t,
    k_h,
    c_p,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """A program handles BH heads of one token: first of q, then of key."""
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_h = tl.arange(0, BH)
    b_cos, b_sin = _load_angles(p_cos_sin, p_positions, i_t, c_p, HALF, BR)
    q_parts = tl.cdiv(H, BH)
    if i_h < q_parts:
        p_q += i_t * q_t
        o_h += i_h * BH
        _rotate(p_q, p_q, p_q_weight, eps, b_cos, b_sin, o_h, H, q_h, q_h, D, HALF, BD, BR)
    else:
        p_key += i_t * k_t
        o_h += (i_h - q_parts) * BH
        _rotate(p_key, p_key, p_key_weight, eps, b_cos, b_sin, o_h, H_KV, k_h, k_h, D, HALF, BD, BR)


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
    p_q_weight,
    p_key_weight,
    eps,
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
    """A program handles BH heads of one token: first of q, then of key and value."""
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_h = tl.arange(0, BH)
    slot = tl.load(p_slots + i_t)
    b_cos, b_sin = _load_angles(p_cos_sin, p_positions, i_t, c_p, HALF, BR)
    q_parts = tl.cdiv(H, BH)
    if i_h < q_parts:
        p_q += i_t * q_t
        o_h += i_h * BH
        _rotate(p_q, p_q, p_q_weight, eps, b_cos, b_sin, o_h, H, q_h, q_h, D, HALF, BD, BR)
    elif slot >= 0:
        o_h += (i_h - q_parts) * BH
        p_key += i_t * k_t
        p_key_cache += slot // BLOCK_SIZE * kc_b + slot % BLOCK_SIZE * kc_t
        p_value_cache += slot // BLOCK_SIZE * vc_b + slot % BLOCK_SIZE * vc_t
        _rotate(p_key, p_key_cache, p_key_weight, eps, b_cos, b_sin, o_h, H_KV, k_h, kc_h, D, HALF, BD, BR)
        if p_key_weight is None and 2 * HALF < D:
            _copy_channels(p_key, p_key_cache, o_h, H_KV, k_h, kc_h, 2 * HALF, D, BD)
        _copy_channels(p_value + i_t * v_t, p_value_cache, o_h, H_KV, v_h, vc_h, 0, D, BD)


def _sizes(q: Tensor, key: Tensor, cos_sin: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the constants that both kernels take."""
    (num_tokens, num_heads, head_dim), num_kv_heads, half = q.shape, key.shape[1], cos_sin.shape[1] // 2
    BH = min(16, triton.next_power_of_2(num_heads))
    sizes = {
        "H": num_heads,
        "H_KV": num_kv_heads,
        "D": head_dim,
        "HALF": half,
        "BH": BH,
        "BD": triton.next_power_of_2(head_dim),
        "BR": triton.next_power_of_2(half),
    }
    return (num_tokens, triton.cdiv(num_heads, BH) + triton.cdiv(num_kv_heads, BH)), sizes


def rope_(q: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, norm: HeadNorm | None = None) -> None:
    """q [T, H, D], key [T, H_kv, D] in place. Contract: `Attention.rope_`."""
    grid, sizes = _sizes(q, key, cos_sin)
    if 0 in grid:
        return
    _rope_kernel[grid](
        q,
        key,
        positions,
        cos_sin,
        *(norm or NO_NORM),
        *q.stride()[:2],
        *key.stride()[:2],
        cos_sin.stride(0),
        **sizes,
        num_warps=4,
    )


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
    """q [T, H, D] in place; key, value [T, H_kv, D] into the caches. Contract: `Attention.rope_and_store_kv`."""
    grid, sizes = _sizes(q, key, cos_sin)
    if 0 in grid:
        return
    _rope_store_kernel[grid](
        q,
        key,
        value,
        positions,
        cos_sin,
        key_cache,
        value_cache,
        slot_mapping,
        *(norm or NO_NORM),
        *q.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        cos_sin.stride(0),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        BLOCK_SIZE=key_cache.shape[1],
        **sizes,
        num_warps=4,
    )
