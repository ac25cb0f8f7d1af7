"""`minimax`: prefill parallel over chunks of all rows at once.

A row is cut into as many chunks as keep the device busy. The first launch computes the k^T v product of every chunk but
each row's last. The second walks every chunk from the state before it, which it sums from the products of the chunks
before. A row of one chunk needs no product; where all rows have one chunk there is one launch.
Formulas: `lightning/reference.py`, with a chunk for the block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from ..varlen import find_block, num_blocks
from .tile import ZERO_DECAY, load_rows, load_state, num_processors, state_pointers, store_rows, walk, walk_tiles

PROGRAMS_PER_PROCESSOR = 2  # wanted: more chunks cost more products than they hide latency
SHORTEST_CHUNK = 128
MOST_CHUNKS = 32  # of a row: the last one sums the products of all before it


@triton.jit(
    do_not_specialize=["num_rows", "CHUNK"], do_not_specialize_on_alignment=["p_slots", "p_continues", "p_start"]
)
def _product_kernel(
    p_k,
    p_v,
    p_slopes,
    p_state,
    p_slots,
    p_continues,
    p_start,
    p_products,
    p_initial,
    num_rows,
    CHUNK,
    k_t: tl.constexpr,
    k_h,
    v_t: tl.constexpr,
    v_h,
    s_n,
    s_h,
    s_k: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """products[first // CHUNK + i] = sum_b e^{-s(CHUNK-b)} k_b v_b^T over chunk i of the row that starts at `first`.

    The last chunk's program copies the row's initial state to initial[first // CHUNK] instead: the next launch
    overwrites the slot while programs of other chunks still need it. Two rows never share an index, as a row of n
    tokens writes fewer than n / CHUNK products.
    """
    i_v, i_h, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_local = find_block(p_start, num_rows, i_c, CHUNK)
    first = tl.load(p_start + i_b).to(tl.int64)
    n = (tl.load(p_start + i_b + 1) - first).to(tl.int32)
    start = i_local * CHUNK
    if n <= CHUNK or start >= n:
        return
    slot = tl.load(p_slots + i_b)
    if slot < 0:
        return
    entry = first // CHUNK
    if start + CHUNK >= n:
        if tl.load(p_continues + i_b):
            p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
            p_c, m_c = state_pointers(p_initial, entry, i_h, i_v, H * K * V, K * V, V, K, V, BK, BV)
            tl.store(p_c, tl.load(p_s, mask=m_s, other=0.0).to(tl.float32), mask=m_c)
        return
    slope = tl.load(p_slopes + i_h)
    p_k += (first + start) * k_t + i_h * k_h
    p_v += (first + start) * v_t + i_h * v_h
    b_out = tl.exp(-slope * (BT - 1 - tl.arange(0, BT)))
    block_decay = tl.exp(-slope * BT)
    b_kv = tl.zeros([BK, BV], tl.float32)
    for i_t in range(0, CHUNK, BT):
        b_k = load_rows(p_k, i_t, CHUNK, 0, k_t, K, BT, BK)
        b_v = load_rows(p_v, i_t, CHUNK, i_v, v_t, V, BT, BV)
        # [BK, BT] @ [BT, BV] -> [BK, BV]
        b_v = (b_v * b_out[:, None]).to(b_v.dtype)
        b_kv = tl.dot(tl.trans(b_k), b_v, b_kv * block_decay, input_precision=PRECISION)
    p_kv, m_kv = state_pointers(p_products, entry + i_local, i_h, i_v, H * K * V, K * V, V, K, V, BK, BV)
    tl.store(p_kv, b_kv, mask=m_kv)


@triton.jit
def _state_before(
    p_products,
    p_initial,
    entry,
    i_local,
    continues,
    slope,
    i_h,
    i_v,
    CHUNK,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ZERO_DECAY: tl.constexpr,
):
    """State [BK, BV] before chunk i_local of a row of several, from the products that `_product_kernel` left.

    Not even the first chunk reads the slot: the last chunk's program may have written it already. Chunks so far back
    that their decay is zero are not read.
    """
    reach = tl.minimum(ZERO_DECAY / (slope * CHUNK), 1e9).to(tl.int32)
    oldest = tl.maximum(i_local - 1 - reach, 0)
    decay = tl.exp(-slope * CHUNK)
    p_c, m_c = state_pointers(p_initial, entry, i_h, i_v, H * K * V, K * V, V, K, V, BK, BV)
    b_s = load_state(p_c, m_c, continues and oldest == 0, BK, BV)
    for i in range(oldest, i_local):
        p_kv, m_kv = state_pointers(p_products, entry + i, i_h, i_v, H * K * V, K * V, V, K, V, BK, BV)
        b_s = b_s * decay + tl.load(p_kv, mask=m_kv, other=0.0)
    return b_s


@triton.jit(
    do_not_specialize=["num_rows", "CHUNK"], do_not_specialize_on_alignment=["p_slots", "p_continues", "p_start"]
)
def _chunk_kernel(
    p_q,
    p_k,
    p_v,
    p_slopes,
    p_state,
    p_slots,
    p_continues,
    p_start,
    p_products,
    p_initial,
    p_o,
    scale,
    num_rows,
    CHUNK,
    q_t: tl.constexpr,
    q_h,
    k_t: tl.constexpr,
    k_h,
    v_t: tl.constexpr,
    v_h,
    o_t: tl.constexpr,
    o_h,
    s_n,
    s_h,
    s_k: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ZERO_DECAY: tl.constexpr,
):
    """Outputs of one chunk; the last chunk of a row leaves the row's state in its slot."""
    i_v, i_h, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_local = find_block(p_start, num_rows, i_c, CHUNK)
    first = tl.load(p_start + i_b).to(tl.int64)
    n = (tl.load(p_start + i_b + 1) - first).to(tl.int32)
    start = i_local * CHUNK
    if start >= n:
        return
    m = tl.minimum(n - start, CHUNK)
    p_q += (first + start) * q_t + i_h * q_h
    p_k += (first + start) * k_t + i_h * k_h
    p_v += (first + start) * v_t + i_h * v_h
    p_o += (first + start) * o_t + i_h * o_h
    slot = tl.load(p_slots + i_b)
    if slot < 0:
        for i_t in range(0, m, BT):
            store_rows(p_o, tl.zeros([BT, BV], tl.float32), i_t, m, i_v, o_t, V, BT, BV)
        return
    slope = tl.load(p_slopes + i_h)
    continues = tl.load(p_continues + i_b)
    p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    if n <= CHUNK:
        b_s = load_state(p_s, m_s, continues, BK, BV)
    else:
        b_s = _state_before(
            p_products,
            p_initial,
            first // CHUNK,
            i_local,
            continues,
            slope,
            i_h,
            i_v,
            CHUNK,
            H,
            K,
            V,
            BK,
            BV,
            ZERO_DECAY,
        )
    b_s = walk(p_q, p_k, p_v, p_o, b_s, slope, scale, m, i_v, q_t, k_t, v_t, o_t, K, V, BT, BK, BV, DOT, PRECISION)
    if start + CHUNK >= n:
        tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_s)


def chunk_size(num_tokens: int, longest: int, programs_per_chunk: int, block: int, device: torch.device) -> int:
    """Tokens per chunk, a multiple of `block`: no shorter than it takes to occupy the device."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device)
    chunk = max(num_tokens * programs_per_chunk // wanted, triton.cdiv(longest, MOST_CHUNKS), SHORTEST_CHUNK)
    return triton.cdiv(chunk, block) * block


def minimax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """Contract: `Lightning.minimax`.

    Allocates 2 * (T // chunk) * H * K * V floats, unless every row fits one chunk.
    """
    num_heads, head_dim = q.shape[1:]
    value_dim = v.shape[2]
    num_rows = rows.slots.shape[0]
    if num_rows == 0:
        return out
    num_tokens = q.shape[0]
    tiles = walk_tiles(q, v, num_rows)
    programs_per_chunk = num_heads * triton.cdiv(value_dim, tiles.BV)
    chunk = chunk_size(num_tokens, rows.max_len, programs_per_chunk, tiles.BT, q.device)
    entries = num_tokens // chunk
    if rows.max_len <= chunk:
        entries = 0
    else:
        tiles = tiles._replace(num_stages=2)  # there will be programs enough
    products, initial = torch.empty(2, entries, num_heads, head_dim, value_dim, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(value_dim, tiles.BV), num_heads, num_blocks(num_tokens, num_rows, chunk))
    sizes = {"H": num_heads, "K": head_dim, "V": value_dim}
    if entries:
        _product_kernel[grid](
            k,
            v,
            slopes,
            state,
            rows.slots,
            rows.continues,
            rows.starts,
            products,
            initial,
            num_rows,
            chunk,
            *k.stride()[:2],
            *v.stride()[:2],
            *state.stride()[:3],
            **sizes,
            BT=tiles.BT,
            BK=tiles.BK,
            BV=tiles.BV,
            PRECISION=tiles.PRECISION,
            num_warps=tiles.num_warps,
            num_stages=3,
        )
    _chunk_kernel[grid](
        q,
        k,
        v,
        slopes,
        state,
        rows.slots,
        rows.continues,
        rows.starts,
        products,
        initial,
        out,
        scale,
        num_rows,
        chunk,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        *state.stride()[:3],
        **sizes,
        **tiles._asdict(),
        ZERO_DECAY=ZERO_DECAY,
    )
    return out
