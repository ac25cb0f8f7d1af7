"""Mixture of experts for a token or two, which hardly share an expert: two launches, nothing sorted.

The bytes of the weights bound it, so every pair reads its expert's matrices by itself, as vector products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dense.activation import silu


@triton.jit(do_not_specialize_on_alignment=["p_weights", "p_experts"])
def _gate_up_kernel(
    p_x,
    p_w,
    p_weights,
    p_experts,
    p_h,
    x_t,
    w_e,
    w_n,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    F: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h[pair] = weight * silu(gate x) * up x, BN channels a program."""
    i_n, i_pair = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    p_x += i_pair // TOP_K * x_t
    p_w += tl.load(p_experts + i_pair).to(tl.int64) * w_e + tl.minimum(o_n, F - 1) * w_n
    b_gate = tl.zeros([BN, BK], tl.float32)
    b_up = tl.zeros([BN, BK], tl.float32)
    for i_k in tl.range(0, SIZE, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < SIZE
        b_x = tl.load(p_x + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
        p_gate = p_w[:, None] + o_k[None, :]
        b_gate += tl.load(p_gate, mask=m_k[None, :], other=0.0).to(tl.float32) * b_x
        b_up += tl.load(p_gate + F * w_n, mask=m_k[None, :], other=0.0).to(tl.float32) * b_x
    b_h = silu(tl.sum(b_gate, axis=1)) * tl.sum(b_up, axis=1) * tl.load(p_weights + i_pair)
    tl.store(p_h + i_pair * F + o_n, b_h.to(p_h.dtype.element_ty), mask=o_n < F)


@triton.jit(do_not_specialize_on_alignment=["p_experts"])
def _down_kernel(
    p_h,
    p_w,
    p_experts,
    p_y,
    w_e,
    w_n,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    F: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y[token] = the sum of down h over its pairs, BN channels a program."""
    i_n, i_t = tl.program_id(0), tl.program_id(1)
    o_n, o_p = i_n * BN + tl.arange(0, BN), tl.arange(0, BP)
    m_p = o_p < TOP_K
    p_h += (i_t * TOP_K + o_p) * F
    b_e = tl.load(p_experts + i_t * TOP_K + o_p, mask=m_p, other=0).to(tl.int64)
    p_w += (b_e * w_e)[:, None] + (tl.minimum(o_n, SIZE - 1) * w_n)[None, :]
    b_y = tl.zeros([BP, BN, BK], tl.float32)
    for i_k in tl.range(0, F, BK, num_stages=STAGES):
        o_k = i_k + tl.arange(0, BK)
        m_k = m_p[:, None] & (o_k < F)[None, :]
        b_h = tl.load(p_h[:, None] + o_k[None, :], mask=m_k, other=0.0).to(tl.float32)
        b_w = tl.load(p_w[:, :, None] + o_k[None, None, :], mask=m_k[:, None, :], other=0.0).to(tl.float32)
        b_y += b_w * b_h[:, None, :]
    b_y = tl.sum(tl.sum(b_y, axis=2), axis=0)
    tl.store(p_y + i_t * SIZE + o_n, b_y.to(p_y.dtype.element_ty), mask=o_n < SIZE)


def is_few(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether hardly any two tokens will meet at an expert."""
    return num_tokens == 1 or num_tokens * top_k * 8 <= num_experts


def moe_few(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Contract: `Experts.moe`, for as few tokens as `is_few` says."""
    (num_tokens, size), width, top_k = x.shape, down.shape[2], experts.shape[1]
    hidden = torch.empty(num_tokens * top_k, width, dtype=x.dtype, device=x.device)
    y = torch.empty(num_tokens, size, dtype=x.dtype, device=x.device)
    experts = experts.contiguous()
    sizes = {"TOP_K": top_k, "SIZE": size, "F": width}
    BP = triton.next_power_of_2(top_k)
    _gate_up_kernel[(triton.cdiv(width, 4), num_tokens * top_k)](
        x,
        gate_up,
        weights.contiguous(),
        experts,
        hidden,
        x.stride(0),
        *gate_up.stride()[:2],
        BN=4,
        BK=min(256, triton.next_power_of_2(size)),
        STAGES=3,
        num_warps=2,
        **sizes,
    )
    _down_kernel[(triton.cdiv(size, 4), num_tokens)](
        hidden,
        down,
        experts,
        y,
        *down.stride()[:2],
        BP=BP,
        BN=4,
        BK=min(max(16, 512 // BP), triton.next_power_of_2(width)),
        STAGES=4,
        num_warps=4,
        **sizes,
    )
    return y
