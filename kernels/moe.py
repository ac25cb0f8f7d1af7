"""Mixture of experts as two grouped matrix products over (token, expert) pairs sorted by expert.

The launch covers an upper bound of blocks, so nothing about the routing is read on the host; each pair has
its own row of the result, summed per token in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import silu
from .varlen import find_block, num_blocks


@triton.jit
def _load_weight(p_w, o_n, o_k, w_n, N, SIZE):
    """Rows o_n of a weight [N, SIZE], transposed: [BK, BN]."""
    return tl.load(p_w + o_n[None, :] * w_n + o_k[:, None], mask=(o_n < N)[None, :] & (o_k < SIZE)[:, None], other=0.0)


@triton.jit(do_not_specialize_on_alignment=["p_order", "p_start"])
def _gate_up_kernel(
    p_x,
    p_w,
    p_order,
    p_start,
    p_h,
    num_experts,
    x_t,
    w_e,
    w_n,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h[pair] = silu(gate x) * up x for the sorted pairs; x [T, SIZE], w [E, 2F, SIZE], h [pairs, F]."""
    i_e, i_block = find_block(p_start, num_experts, tl.program_id(0), BM)
    end = tl.load(p_start + i_e + 1)
    o_pair = tl.load(p_start + i_e) + i_block * BM + tl.arange(0, BM)
    if i_block * BM >= end - tl.load(p_start + i_e):
        return
    m_pair = o_pair < end
    o_token = tl.load(p_order + o_pair, mask=m_pair, other=0) // TOP_K
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    p_w += i_e.to(tl.int64) * w_e
    b_gate = tl.zeros([BM, BN], tl.float32)
    b_up = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, SIZE, BK):
        o_k = i_k + tl.arange(0, BK)
        b_x = tl.load(
            p_x + o_token[:, None] * x_t + o_k[None, :], mask=m_pair[:, None] & (o_k < SIZE)[None, :], other=0.0
        )
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_gate += tl.dot(b_x, _load_weight(p_w, o_n, o_k, w_n, F, SIZE), input_precision=PRECISION)
        b_up += tl.dot(b_x, _load_weight(p_w + F * w_n, o_n, o_k, w_n, F, SIZE), input_precision=PRECISION)
    b_h = (silu(b_gate) * b_up).to(p_h.dtype.element_ty)
    tl.store(p_h + o_pair[:, None] * F + o_n[None, :], b_h, mask=m_pair[:, None] & (o_n < F)[None, :])


@triton.jit(do_not_specialize_on_alignment=["p_weights", "p_order", "p_start"])
def _down_kernel(
    p_h,
    p_w,
    p_weights,
    p_order,
    p_start,
    p_y,
    num_experts,
    w_e,
    w_n,
    SIZE: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[order[pair]] = weight * down h[pair]; h [pairs, F], w [E, SIZE, F], y [pairs, SIZE] float32."""
    i_e, i_block = find_block(p_start, num_experts, tl.program_id(0), BM)
    end = tl.load(p_start + i_e + 1)
    o_pair = tl.load(p_start + i_e) + i_block * BM + tl.arange(0, BM)
    if i_block * BM >= end - tl.load(p_start + i_e):
        return
    m_pair = o_pair < end
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    p_w += i_e.to(tl.int64) * w_e
    b_y = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, F, BK):
        o_k = i_k + tl.arange(0, BK)
        b_h = tl.load(p_h + o_pair[:, None] * F + o_k[None, :], mask=m_pair[:, None] & (o_k < F)[None, :], other=0.0)
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_y += tl.dot(b_h, _load_weight(p_w, o_n, o_k, w_n, SIZE, F), input_precision=PRECISION)
    o_row = tl.load(p_order + o_pair, mask=m_pair, other=0)
    b_y *= tl.load(p_weights + o_row, mask=m_pair, other=0.0)[:, None]
    tl.store(p_y + o_row[:, None] * SIZE + o_n[None, :], b_y, mask=m_pair[:, None] & (o_n < SIZE)[None, :])


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Contract: `Kernels.moe`."""
    num_tokens, size = x.shape
    if num_tokens == 0:
        return x.new_empty(0, size)
    num_experts, top_k, width = gate_up.shape[0], experts.shape[1], down.shape[2]
    num_pairs = num_tokens * top_k
    by_expert, order = experts.flatten().sort(stable=True)
    start = torch.searchsorted(by_expert, torch.arange(num_experts + 1, device=x.device))  # [E + 1] int64
    BM = 16 if num_pairs <= 16 * num_experts else 64
    BN, BK = (32, 32) if x.dtype == torch.float32 else (64, 64)
    blocks = num_blocks(num_pairs, num_experts, BM)
    options = {
        "BM": BM,
        "BN": BN,
        "BK": BK,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 2,
    }
    hidden = torch.empty(num_pairs, width, dtype=x.dtype, device=x.device)
    _gate_up_kernel[(blocks, triton.cdiv(width, BN))](
        x,
        gate_up,
        order,
        start,
        hidden,
        num_experts,
        x.stride(0),
        *gate_up.stride()[:2],
        TOP_K=top_k,
        SIZE=size,
        F=width,
        **options,
    )
    y = torch.empty(num_tokens, top_k, size, dtype=torch.float32, device=x.device)
    _down_kernel[(blocks, triton.cdiv(size, BN))](
        hidden,
        down,
        weights.contiguous(),
        order,
        start,
        y,
        num_experts,
        *down.stride()[:2],
        SIZE=size,
        F=width,
        **options,
    )
    return y.sum(dim=1).to(x.dtype)
