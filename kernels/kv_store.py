"""Scatter a step's keys and values into the paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=["p_slots"])
def _store_kernel(
    p_key,
    p_value,
    p_key_cache,
    p_value_cache,
    p_slots,
    k_t,
    k_h,
    v_t,
    v_h,
    kc_b,
    kc_t,
    kc_h,
    vc_b,
    vc_t,
    vc_h,
    BLOCK_SIZE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_t)
    if slot < 0:
        return
    i_block, i_offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    o_h, o_d = tl.arange(0, BH)[:, None], tl.arange(0, BD)[None, :]
    m = (o_h < H) & (o_d < D)
    b_key = tl.load(p_key + i_t * k_t + o_h * k_h + o_d, mask=m)
    b_value = tl.load(p_value + i_t * v_t + o_h * v_h + o_d, mask=m)
    p_key_cache += i_block * kc_b + i_offset * kc_t
    p_value_cache += i_block * vc_b + i_offset * vc_t
    tl.store(p_key_cache + o_h * kc_h + o_d, b_key.to(p_key_cache.dtype.element_ty), mask=m)
    tl.store(p_value_cache + o_h * vc_h + o_d, b_value.to(p_value_cache.dtype.element_ty), mask=m)


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """key, value [T, H_kv, D] into the caches in place; slot -1 is dropped. Contract: `Kernels.store_kv`."""
    num_tokens, num_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    _store_kernel[(num_tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        BLOCK_SIZE=key_cache.shape[1],
        H=num_heads,
        D=head_dim,
        BH=triton.next_power_of_2(num_heads),
        BD=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
