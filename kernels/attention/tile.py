# ruff: noqa: ANN201 device functions return registers
"""What the two attention kernels share: gathering keys through the block table, and the online softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def load_paged(p_cache, p_blocks, o_n, length, c_b, c_t, BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Positions o_n [BN] of one row and one kv head, zeros at and past `length`: [BN, BD].

    `p_cache` is at the head; addresses are int64.
    """
    m_n = o_n < length
    o_d = tl.arange(0, BD)
    i_block = tl.load(p_blocks + o_n // BLOCK_SIZE, mask=m_n, other=0).to(tl.int64)
    o_token = i_block * c_b + (o_n % BLOCK_SIZE) * c_t
    return tl.load(p_cache + o_token[:, None] + o_d[None, :], mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def online_softmax(b_o, b_max, b_sum, b_score, b_v, PRECISION: tl.constexpr):
    """Adds keys to a running softmax (Milakov and Gimelshein 2018).

    b_score [BM, BN] in log2 units, -inf where masked; the first keys must make every maximum finite.
    """
    b_new = tl.maximum(b_max, tl.max(b_score, axis=1))
    b_p = tl.exp2(b_score - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_old + tl.sum(b_p, axis=1)
    # [BM, BN] @ [BN, BD] -> [BM, BD]
    b_o = b_o * b_old[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_o, b_new, b_sum


def tile_sizes(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, str]:
    """(BM queries, BN keys, BD >= D, precision of the dots) that fit registers and shared memory."""
    BD = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        return 32, 32 if BD <= 128 else 16, BD, "ieee"
    return 64, 64 if BD <= 128 else 32, BD, "tf32"
