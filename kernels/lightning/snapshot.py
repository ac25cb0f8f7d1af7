"""The states that rows pass within a step, which `minimax` and `seg_la` keep in registers only.

A program owns one V tile of one head of one snapshot, and walks the row's keys and values from its first token of the
step. Snapshots of one row repeat each other's work. A step has few of them, so an order among them would cost more.
Formulas: `lightning/reference.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from .tile import ZERO_DECAY, load_rows, load_state, state_pointers, walk_tiles


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_start", "p_places"])
def _snapshot_kernel(
    p_k,
    p_v,
    p_slopes,
    p_state,
    p_slots,
    p_continues,
    p_start,
    p_places,
    p_snapshots,
    k_t: tl.constexpr,
    k_h,
    v_t: tl.constexpr,
    v_h,
    s_n,
    s_h,
    s_k: tl.constexpr,
    c_n,
    c_h,
    c_k: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    ZERO_DECAY: tl.constexpr,
):
    """Tokens so far back that their decay is zero are not read."""
    i_v, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b = tl.load(p_places + 3 * i_s)
    n = tl.load(p_places + 3 * i_s + 1)
    snapshot = tl.load(p_places + 3 * i_s + 2)
    if snapshot < 0:
        return
    slope = tl.load(p_slopes + i_h)
    first = tl.load(p_start + i_b).to(tl.int64)
    p_k += first * k_t + i_h * k_h
    p_v += first * v_t + i_h * v_h
    reach = tl.minimum(ZERO_DECAY / slope, 1e9).to(tl.int32)
    oldest = tl.maximum(n - 1 - reach, 0) // BT * BT
    p_s, m_s = state_pointers(p_state, tl.load(p_slots + i_b), i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    b_s = load_state(p_s, m_s, tl.load(p_continues + i_b) and oldest == 0, BK, BV)
    a = tl.arange(0, BT)
    for start in range(oldest, n, BT):
        m = tl.minimum(n - start, BT)
        b_k = load_rows(p_k, start, n, 0, k_t, K, BT, BK)
        b_v = load_rows(p_v, start, n, i_v, v_t, V, BT, BV)
        b_out = tl.exp(-slope * tl.maximum(m - 1 - a, 0))
        b_v = (b_v * b_out[:, None]).to(b_v.dtype)
        # [BK, BT] @ [BT, BV] -> [BK, BV]
        b_s = tl.dot(tl.trans(b_k), b_v, b_s * tl.exp(-slope * m), input_precision=PRECISION)
    p_c, m_c = state_pointers(p_snapshots, snapshot, i_h, i_v, c_n, c_h, c_k, K, V, BK, BV)
    tl.store(p_c, b_s.to(p_snapshots.dtype.element_ty), mask=m_c)


def snapshot(
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    rows: Rows,
    places: Tensor,
    snapshots: Tensor,
) -> None:
    """Contract: `Lightning.snapshot`."""
    num_heads, head_dim = k.shape[1:]
    value_dim = v.shape[2]
    tiles = walk_tiles(k, v, places.shape[0])
    grid = (triton.cdiv(value_dim, tiles.BV), num_heads, places.shape[0])
    if 0 in grid:
        return
    _snapshot_kernel[grid](
        k,
        v,
        slopes,
        state,
        rows.slots,
        rows.continues,
        rows.starts,
        places,
        snapshots,
        *k.stride()[:2],
        *v.stride()[:2],
        *state.stride()[:3],
        *snapshots.stride()[:3],
        K=head_dim,
        V=value_dim,
        BT=tiles.BT,
        BK=tiles.BK,
        BV=tiles.BV,
        PRECISION=tiles.PRECISION,
        ZERO_DECAY=ZERO_DECAY,
        num_warps=tiles.num_warps,
        num_stages=3,
    )
