# ruff: noqa: ANN201 device functions return registers
"""Shared by the two attention kernels: keys gathered through the block table, and the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_blocks(p_blocks, i_n, length, BLOCK_SIZE: tl.constexpr, BN: tl.constexpr):
    """Cache blocks of the positions i_n, i_n + 1, ... of one row, [BN]; block 0 at and past `length`.

    i_n is a multiple of BN. Loops ask one tile ahead: an address that waits for its block number in the same turn
    cannot be prefetched.
    """
    o_n = tl.arange(0, BN)
    m_n = i_n + o_n < length
    if BN % BLOCK_SIZE == 0:  # a tile starts with a block, so the vector part does not change in a loop
        return tl.load(p_blocks + o_n // BLOCK_SIZE + i_n // BLOCK_SIZE, mask=m_n, other=0)
    return tl.load(p_blocks + (i_n + o_n) // BLOCK_SIZE, mask=m_n, other=0)


@triton.jit
def load_tokens(
    p_cache,
    b_block,
    i_n,
    length,
    c_b,
    c_t,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Positions i_n, i_n + 1, ... in their blocks b_block [BN], of the head that p_cache is at: [BN, BD].

    Zeros at and past `length` if MASKED. Only the base of a block needs 64 bits.
    """
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    o_in_block = o_n % BLOCK_SIZE if BN % BLOCK_SIZE == 0 else (i_n + o_n) % BLOCK_SIZE
    p_token = p_cache + (o_in_block * c_t)[:, None] + o_d[None, :]  # leaves the loop, like the block's vector part
    p_token += (b_block.to(tl.int64) * c_b)[:, None]
    if MASKED:
        return tl.load(p_token, mask=(i_n + o_n < length)[:, None] & (o_d < D)[None, :], other=0.0)
    if D < BD:
        return tl.load(p_token, mask=(o_d < D)[None, :], other=0.0)
    return tl.load(p_token)


@triton.jit
def online_softmax(b_o, b_max, b_sum, b_score, b_v, scale_log2, PRECISION: tl.constexpr):
    """Adds keys to a running softmax (Milakov and Gimelshein 2018); b_max is in log2 units.

    b_score [BM, BN] is unscaled, -inf where masked; the first keys must make every maximum finite.
    """
    b_new = tl.maximum(b_max, tl.max(b_score, axis=1) * scale_log2)
    b_p = tl.exp2(b_score * scale_log2 - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_old + tl.sum(b_p, axis=1)
    # [BM, BN] @ [BN, BD] -> [BM, BD]
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_old[:, None], input_precision=PRECISION)
    return b_o, b_new, b_sum
