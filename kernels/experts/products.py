"""Mixture of experts as two grouped matrix products over (token, expert) pairs sorted by expert.

The launch covers an upper bound of blocks, so the host reads nothing of the routing. A pair has its own row in both
products. A token's rows are summed in the order of its experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Weight
from ..dense.activation import silu, silu_and_mul
from ..dense.dequantise import dequantise
from ..dense.quantised_rows import reads, rows
from .few import is_few, moe_few
from .routing import SortedPairs, sort_pairs


class Tile(NamedTuple):
    """One program's share of a product, and how it is run."""

    rows: int  # BM: pairs of one expert
    columns: int  # BN: rows of the expert's weight
    depth: int  # BK: of the reduction, per step
    warps: int
    stages: int


def choose_tile(pairs_per_expert: float, dtype: torch.dtype) -> Tile:
    """Few pairs: narrow tiles that stream weights, several programs per processor; many: large ones for the wgmma."""
    if dtype == torch.float32:
        return Tile(16, 64, 32, 4, 2) if pairs_per_expert <= 16 else Tile(64, 64, 32, 4, 2)
    if pairs_per_expert <= 8:
        return Tile(16, 64, 128, 4, 5)
    if pairs_per_expert <= 24:
        return Tile(32, 128, 128, 4, 3)
    if pairs_per_expert <= 96:
        return Tile(64, 128, 64, 4, 3)
    return Tile(128, 256, 64, 8, 4)


@triton.jit
def _locate(p_blocks, num_blocks, NUM_COLUMNS: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr):
    """Expert, sorted positions [BM], their mask and the column tile of this program.

    GROUP blocks run through all columns together: a weight tile read by one is in the cache for the others.
    """
    i_group = tl.program_id(0) // (GROUP * NUM_COLUMNS)
    i_in_group = tl.program_id(0) % (GROUP * NUM_COLUMNS)
    size = tl.minimum(num_blocks - i_group * GROUP, GROUP)
    p_blocks += (i_group * GROUP + i_in_group % size) * 3
    o_row = tl.load(p_blocks + 1) + tl.arange(0, BM)
    return tl.load(p_blocks), o_row, o_row < tl.load(p_blocks + 2), i_in_group // size


@triton.jit
def _product(
    p_x, m_x, p_w, SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """The rows at p_x [BM] times the rows at p_w [BN], SIZE long each: [BM, BN] float32."""
    o_k = tl.arange(0, BK)
    b_y = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, SIZE, BK):
        if SIZE % BK == 0:
            b_x = tl.load(p_x[:, None] + (i_k + o_k)[None, :], mask=m_x[:, None], other=0.0)
            b_w = tl.load(p_w[None, :] + (i_k + o_k)[:, None])
        else:
            m_k = i_k + o_k < SIZE
            b_x = tl.load(p_x[:, None] + (i_k + o_k)[None, :], mask=m_x[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w[None, :] + (i_k + o_k)[:, None], mask=m_k[:, None], other=0.0)
        # [BM, BK] @ [BK, BN] -> [BM, BN]
        b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
    return b_y


@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["p_weights"])
def _gate_up_kernel(
    p_x,
    p_w,
    p_weights,
    p_order,
    p_blocks,
    p_h,
    num_blocks,
    x_t,
    w_e,
    w_n,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h[sorted] = weight * silu(gate x) * up x, in one product whose columns are gate and up in turn."""
    BF: tl.constexpr = BN // 2
    i_e, o_row, m_row, i_f = _locate(p_blocks, num_blocks, tl.cdiv(F, BF), BM, GROUP)
    if i_e < 0:
        return
    o_pair = tl.load(p_order + o_row, mask=m_row, other=0)
    p_x += (o_pair // TOP_K).to(tl.int64) * x_t
    o_n = tl.arange(0, BN)
    o_n = tl.minimum(i_f * BF + o_n // 2, F - 1) + o_n % 2 * F
    p_w += i_e.to(tl.int64) * w_e + o_n * w_n
    b_gate_up = _product(p_x, m_row, p_w, SIZE, BM, BN, BK, PRECISION)
    b_gate, b_up = tl.split(tl.reshape(b_gate_up, [BM, BF, 2]))
    b_h = silu(b_gate) * b_up * tl.load(p_weights + o_pair, mask=m_row, other=0.0)[:, None]
    o_f = i_f * BF + tl.arange(0, BF)
    p_h += o_row.to(tl.int64)[:, None] * F + o_f[None, :]
    tl.store(p_h, b_h.to(p_h.dtype.element_ty), mask=m_row[:, None] & (o_f < F)[None, :])


@triton.jit(do_not_specialize=["num_blocks"])
def _down_kernel(
    p_h,
    p_w,
    p_order,
    p_blocks,
    p_y,
    num_blocks,
    w_e,
    w_n,
    SIZE: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[order[sorted]] = down h[sorted]."""
    i_e, o_row, m_row, i_n = _locate(p_blocks, num_blocks, tl.cdiv(SIZE, BN), BM, GROUP)
    if i_e < 0:
        return
    p_h += o_row.to(tl.int64) * F
    o_n = i_n * BN + tl.arange(0, BN)
    p_w += i_e.to(tl.int64) * w_e + tl.minimum(o_n, SIZE - 1) * w_n
    b_y = _product(p_h, m_row, p_w, F, BM, BN, BK, PRECISION)
    o_pair = tl.load(p_order + o_row, mask=m_row, other=0)
    p_y += o_pair.to(tl.int64)[:, None] * SIZE + o_n[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_row[:, None] & (o_n < SIZE)[None, :])


@triton.jit
def _combine_kernel(p_y, p_out, TOP_K: tl.constexpr, SIZE: tl.constexpr, BD: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_out = tl.zeros([BD], tl.float32)
    for i_k in tl.static_range(TOP_K):
        b_out += tl.load(p_y + (i_t * TOP_K + i_k) * SIZE + o_d, mask=o_d < SIZE, other=0.0).to(tl.float32)
    tl.store(p_out + i_t * SIZE + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < SIZE)


def _options(tile: Tile, width: int, size: int, dtype: torch.dtype) -> dict[str, int | str]:
    """The tile cut to a weight [width, size]. A depth that divides size needs no masks."""
    depth = math.gcd(size, tile.depth)
    return {
        "BM": tile.rows,
        "BN": min(tile.columns, max(16, triton.next_power_of_2(width))),
        "BK": depth if depth >= 32 else min(tile.depth, max(16, triton.next_power_of_2(size))),
        "GROUP": 4,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def gate_up_product(x: Tensor, gate_up: Tensor, weights: Tensor, top_k: int, pairs: SortedPairs, tile: Tile) -> Tensor:
    """x [T, d], gate_up [E, 2F, d] -> weight * silu(gate x) * up x per pair, [T * k, F], sorted as `pairs`."""
    size, width = x.shape[1], gate_up.shape[1] // 2
    hidden = torch.empty(pairs.order.shape[0], width, dtype=x.dtype, device=x.device)
    options = _options(tile, 2 * width, size, x.dtype)
    _gate_up_kernel[(pairs.blocks.shape[0] * triton.cdiv(2 * width, options["BN"]),)](
        x,
        gate_up,
        weights.contiguous(),
        *pairs,
        hidden,
        pairs.blocks.shape[0],
        x.stride(0),
        *gate_up.stride()[:2],
        TOP_K=top_k,
        SIZE=size,
        F=width,
        **options,
    )
    return hidden


def down_product(hidden: Tensor, down: Tensor, pairs: SortedPairs, tile: Tile) -> Tensor:
    """hidden [T * k, F] sorted as `pairs`, down [E, d, F] -> [T * k, d] in the order of tokens."""
    size, width = down.shape[1:]
    y = torch.empty(hidden.shape[0], size, dtype=hidden.dtype, device=hidden.device)
    options = _options(tile, size, width, hidden.dtype)
    _down_kernel[(pairs.blocks.shape[0] * triton.cdiv(size, options["BN"]),)](
        hidden,
        down,
        *pairs,
        y,
        pairs.blocks.shape[0],
        *down.stride()[:2],
        SIZE=size,
        F=width,
        **options,
    )
    return y


def combine(y: Tensor, top_k: int) -> Tensor:
    """y [T * k, d] -> [T, d], summed in float32."""
    if top_k == 1:
        return y
    num_tokens, size = y.shape[0] // top_k, y.shape[1]
    out = torch.empty(num_tokens, size, dtype=y.dtype, device=y.device)
    BD = min(1024, triton.next_power_of_2(size))
    _combine_kernel[(num_tokens, triton.cdiv(size, BD))](y, out, TOP_K=top_k, SIZE=size, BD=BD, num_warps=4)
    return out


def moe(x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
    """Contract: `Experts.moe`."""
    (num_tokens, top_k), num_experts = experts.shape, gate_up.shape[0]
    if num_tokens == 0:
        return torch.empty_like(x)
    if num_tokens * top_k <= num_experts and reads(gate_up) and reads(down):
        return _moe_by_pairs(x, gate_up, down, weights, experts)
    w_gate_up, w_down = (dequantise(weight, x.dtype) for weight in (gate_up, down))
    if is_few(num_tokens, top_k, num_experts):
        return moe_few(x, w_gate_up, w_down, weights, experts)
    tile = choose_tile(num_tokens * top_k / num_experts, x.dtype)
    pairs = sort_pairs(experts, num_experts, tile.rows)
    hidden = gate_up_product(x, w_gate_up, weights, top_k, pairs, tile)
    return combine(down_product(hidden, w_down, pairs, tile), top_k)


def _moe_by_pairs(x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
    """Of quantised experts: every pair reads the bytes of its expert by itself. Up to as many pairs as experts that is
    less than all experts take on the way to plain matrices."""
    by_pair = experts.flatten()
    hidden = silu_and_mul(rows(x, gate_up, torch.float32, by_pair)) * weights.reshape(-1, 1)
    return combine(rows(hidden.to(x.dtype), down, x.dtype, by_pair), experts.shape[1])
