"""Partial rotary embedding in NeoX layout (Su et al. 2021): channel j turns with channel j + R/2."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(p_x, b_cos, b_sin, x_h, H, HALF: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr):
    o_r = tl.arange(0, BR)
    for i_h in range(0, H, BH):
        o_h = i_h + tl.arange(0, BH)
        m_x = (o_h < H)[:, None] & (o_r < HALF)[None, :]
        p_first = p_x + o_h[:, None] * x_h + o_r[None, :]
        b_first = tl.load(p_first, mask=m_x, other=0.0).to(tl.float32)
        b_second = tl.load(p_first + HALF, mask=m_x, other=0.0).to(tl.float32)
        b_1 = b_first * b_cos[None, :] - b_second * b_sin[None, :]
        b_2 = b_second * b_cos[None, :] + b_first * b_sin[None, :]
        tl.store(p_first, b_1.to(p_x.dtype.element_ty), mask=m_x)
        tl.store(p_first + HALF, b_2.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize_on_alignment=["p_positions"])
def _rope_kernel(
    p_q,
    p_k,
    p_positions,
    p_cos_sin,
    q_t,
    q_h,
    k_t,
    k_h,
    c_p,
    H,
    H_KV,
    HALF: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)
    p_cos_sin += tl.load(p_positions + i_t) * c_p
    b_cos = tl.load(p_cos_sin + o_r, mask=o_r < HALF, other=0.0)
    b_sin = tl.load(p_cos_sin + HALF + o_r, mask=o_r < HALF, other=0.0)
    _rotate(p_q + i_t * q_t, b_cos, b_sin, q_h, H, HALF, BH, BR)
    _rotate(p_k + i_t * k_t, b_cos, b_sin, k_h, H_KV, HALF, BH, BR)


def apply_rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """q [T, H, D], k [T, H_kv, D] in place, strided views allowed. Contract: `Kernels.apply_rope`."""
    num_tokens, num_heads = q.shape[:2]
    half = cos_sin.shape[1] // 2
    if num_tokens == 0:
        return
    _rope_kernel[(num_tokens,)](
        q,
        k,
        positions,
        cos_sin,
        *q.stride()[:2],
        *k.stride()[:2],
        cos_sin.stride(0),
        num_heads,
        k.shape[1],
        HALF=half,
        BH=min(32, triton.next_power_of_2(num_heads)),
        BR=triton.next_power_of_2(half),
        num_warps=4,
        num_stages=2,
    )
