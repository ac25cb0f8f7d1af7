# ruff: noqa: ANN201 device functions return registers
"""(I + L)^{-1} of a strictly lower triangular L [64, 64], in float32.

No entry of it exceeds 1, while the powers of L reach 1e17 where tokens repeat: no series of them is summed. The blocks
of 16 on the diagonal are inverted by substitution, row after row of all four at once. Then two neighbours become one,
twice: with X the inverses on the diagonal and E the part of L between neighbours,

    [[X0, 0], [-X1 E X0, X1]] = X - X E X.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _diagonal_blocks(b_l):
    """The four blocks [16, 16] on the diagonal of b_l [64, 64]: [4, 16, 16]."""
    i, j = tl.arange(0, 64)[:, None] // 16, tl.arange(0, 64)[None, :] // 16
    # [block, row, block of the column, column]: all but one block of columns are zeros
    b_d = tl.reshape(tl.where(i == j, b_l, 0.0), [4, 16, 4, 16])
    return tl.sum(b_d, axis=2)


@triton.jit
def _spread(b_d):
    """The inverse of `_diagonal_blocks`, zeros elsewhere."""
    i, j = tl.arange(0, 64)[:, None] // 16, tl.arange(0, 64)[None, :] // 16
    b_l = tl.reshape(tl.broadcast_to(b_d[:, :, None, :], [4, 16, 4, 16]), [64, 64])
    return tl.where(i == j, b_l, 0.0)


@triton.jit
def solve(b_l, PRECISION: tl.constexpr):
    """b_l [64, 64] float32, strictly lower -> (I + b_l)^{-1}. PRECISION: of the products."""
    o = tl.arange(0, 16)
    b_d = _diagonal_blocks(b_l)
    b_x = tl.zeros([4, 16, 16], tl.float32) + (o[:, None] == o[None, :]).to(tl.float32)[None, :, :]
    b_t = tl.permute(b_d, (0, 2, 1))
    for r in range(1, 16):
        b_row = tl.sum(tl.where(o[None, None, :] == r, b_t, 0.0), axis=2)  # [4, 16], row r of each block
        b_new = (o == r).to(tl.float32)[None, :] - tl.sum(b_row[:, :, None] * b_x, axis=1)
        b_x = tl.where(o[None, :, None] == r, b_new[:, None, :], b_x)
    b_a = _spread(b_x)
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    for size in tl.static_range(1, 3):  # 16 rows, then 32
        near = (i // (32 * size) == j // (32 * size)) & (i // (16 * size) != j // (16 * size))
        b_e = tl.where(near, b_l, 0.0)
        # [64, 64] @ [64, 64] -> [64, 64]
        b_xe = tl.dot(b_a, b_e, input_precision=PRECISION)
        b_a = b_a - tl.dot(b_xe, b_a, input_precision=PRECISION)
    return b_a
