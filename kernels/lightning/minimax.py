"""`minimax`: prefill parallel over the chunks of all rows at once, and a kernel of its own for decode.

Prefill takes three launches: the k^T v product of every chunk, a scan over each row's chunks that turns
products into the states before them, and the outputs. Formulas: `lightning/reference.py`, with a chunk for
the block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..varlen import find_block, num_blocks
from .tile import load_rows, load_state, state_pointers, store_rows, tiles_for, token_step

CHUNK = 256  # tokens per stored state: the products of a prefill take T / CHUNK * H * K * V floats


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["p_slots", "p_start"])
def _chunk_product_kernel(
    p_k,
    p_v,
    p_slopes,
    p_slots,
    p_start,
    p_products,
    num_rows,
    k_t,
    k_h,
    v_t,
    v_h,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """products[i_c] = sum_b e^{-s(m-b)} k_b v_b^T over the m tokens of chunk i_c."""
    i_c, i_h, i_v = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_local = find_block(p_start, num_rows, i_c, CHUNK)
    first = tl.load(p_start + i_b).to(tl.int64)
    n = (tl.load(p_start + i_b + 1) - first).to(tl.int32)
    start = i_local * CHUNK
    if start >= n:
        return
    if tl.load(p_slots + i_b) < 0:
        return
    slope = tl.load(p_slopes + i_h)
    p_k += first * k_t + i_h * k_h
    p_v += first * v_t + i_h * v_h
    end = tl.minimum(start + CHUNK, n)
    b_kv = tl.zeros([BK, BV], tl.float32)
    for i_t in range(start, end, BT):
        b_k = load_rows(p_k, i_t, end, 0, k_t, K, BT, BK)
        b_v = load_rows(p_v, i_t, end, i_v, v_t, V, BT, BV)
        b_out = tl.exp(-slope * tl.maximum(end - 1 - i_t - tl.arange(0, BT), 0))
        # [BK, BT] @ [BT, BV] -> [BK, BV]
        b_kv += tl.dot(tl.trans(b_k), (b_v * b_out[:, None]).to(b_v.dtype), input_precision=PRECISION)
    p_kv, m_kv = state_pointers(p_products, i_c, i_h, i_v, H * K * V, K * V, V, K, V, BK, BV)
    tl.store(p_kv, b_kv, mask=m_kv)


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues", "p_start"])
def _chunk_scan_kernel(
    p_slopes,
    p_state,
    p_slots,
    p_continues,
    p_start,
    p_products,
    s_n,
    s_h,
    s_k,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Turns each chunk's product into the state before the chunk; the row's final state goes to its slot."""
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(p_start + i_b)
    n = tl.load(p_start + i_b + 1) - first
    slot = tl.load(p_slots + i_b)
    if n == 0:
        return
    if slot < 0:
        return
    slope = tl.load(p_slopes + i_h)
    p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    b_s = load_state(p_s, m_s, tl.load(p_continues + i_b), BK, BV)
    i_c = first // CHUNK + i_b
    for i_t in range(0, n, CHUNK):
        p_kv, m_kv = state_pointers(p_products, i_c, i_h, i_v, H * K * V, K * V, V, K, V, BK, BV)
        b_kv = tl.load(p_kv, mask=m_kv, other=0.0)
        tl.store(p_kv, b_s, mask=m_kv)
        b_s = b_s * tl.exp(-slope * tl.minimum(n - i_t, CHUNK)) + b_kv
        i_c += 1
    tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_s)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["p_slots", "p_start"])
def _chunk_output_kernel(
    p_q,
    p_k,
    p_v,
    p_slopes,
    p_slots,
    p_start,
    p_states,
    p_o,
    scale,
    num_rows,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    o_t,
    o_h,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BT outputs of a chunk: from the state before it, and from the chunk's tokens up to each."""
    i_c, i_h, i_v = tl.program_id(0) // (CHUNK // BT), tl.program_id(1), tl.program_id(2)
    i_b, i_local = find_block(p_start, num_rows, i_c, CHUNK)
    first = tl.load(p_start + i_b).to(tl.int64)
    n = (tl.load(p_start + i_b + 1) - first).to(tl.int32)
    start = i_local * CHUNK
    i_q = start + tl.program_id(0) % (CHUNK // BT) * BT
    if i_q >= n:
        return
    p_q += first * q_t + i_h * q_h
    p_k += first * k_t + i_h * k_h
    p_v += first * v_t + i_h * v_h
    p_o += first * o_t + i_h * o_h
    if tl.load(p_slots + i_b) < 0:
        store_rows(p_o, tl.zeros([BT, BV], tl.float32), i_q, n, i_v, o_t, V, BT, BV)
        return
    slope = tl.load(p_slopes + i_h)
    p_s, m_s = state_pointers(p_states, i_c, i_h, i_v, H * K * V, K * V, V, K, V, BK, BV)
    b_s = tl.load(p_s, mask=m_s, other=0.0)
    b_q = load_rows(p_q, i_q, n, 0, q_t, K, BT, BK)
    o_q = i_q + tl.arange(0, BT)
    # [BT, BK] @ [BK, BV] -> [BT, BV]
    b_o = tl.dot(b_q.to(DOT), b_s.to(DOT), input_precision=PRECISION)
    b_o *= (tl.exp(-slope * (o_q + 1 - start)) * scale)[:, None]
    for i_t in range(start, i_q + BT, BT):
        b_k = load_rows(p_k, i_t, n, 0, k_t, K, BT, BK)
        b_v = load_rows(p_v, i_t, n, i_v, v_t, V, BT, BV)
        lag = o_q[:, None] - (i_t + tl.arange(0, BT))[None, :]
        b_decay = tl.where(lag >= 0, tl.exp(-slope * tl.maximum(lag, 0)) * scale, 0.0)
        # [BT, BK] @ [BK, BT] -> [BT, BT]
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_decay
        # [BT, BT] @ [BT, BV] -> [BT, BV]
        b_o += tl.dot(b_score.to(b_v.dtype), b_v, input_precision=PRECISION)
    store_rows(p_o, b_o, i_q, n, i_v, o_t, V, BT, BV)


@triton.jit(do_not_specialize_on_alignment=["p_slots", "p_continues"])
def _decode_kernel(
    p_q,
    p_k,
    p_v,
    p_slopes,
    p_state,
    p_slots,
    p_continues,
    p_o,
    scale,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    o_t,
    o_h,
    s_n,
    s_h,
    s_k,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_o += i_b * o_t + i_h * o_h
    slot = tl.load(p_slots + i_b)
    if slot < 0:
        o_v = i_v * BV + tl.arange(0, BV)
        tl.store(p_o + o_v, tl.zeros([BV], p_o.dtype.element_ty), mask=o_v < V)
        return
    p_s, m_s = state_pointers(p_state, slot, i_h, i_v, s_n, s_h, s_k, K, V, BK, BV)
    b_s = load_state(p_s, m_s, tl.load(p_continues + i_b), BK, BV)
    b_s = token_step(
        p_q + i_b * q_t + i_h * q_h,
        p_k + i_b * k_t + i_h * k_h,
        p_v + i_b * v_t + i_h * v_h,
        p_o,
        b_s,
        tl.load(p_slopes + i_h),
        scale,
        i_v,
        K,
        V,
        BK,
        BV,
    )
    tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_s)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    state_indices: Tensor,
    has_initial_state: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    out: Tensor,
) -> Tensor:
    """Contract: `Kernels.lightning_prefill`.

    Allocates (T / 256 + B) * H * K * V floats for the chunk states.
    """
    num_heads, head_dim = q.shape[1:]
    value_dim = v.shape[2]
    num_rows = state_indices.shape[0]
    if num_rows == 0:
        return out
    tiles = tiles_for(q, v)
    num_chunks = num_blocks(q.shape[0], num_rows, CHUNK)
    num_v = triton.cdiv(value_dim, tiles.BV)
    sizes = {"H": num_heads, "K": head_dim, "V": value_dim, "CHUNK": CHUNK, "BK": tiles.BK, "BV": tiles.BV}
    options = {"num_warps": 4, "num_stages": 2}
    states = torch.empty(num_chunks, num_heads, head_dim, value_dim, dtype=torch.float32, device=q.device)
    _chunk_product_kernel[(num_chunks, num_heads, num_v)](
        k,
        v,
        slopes,
        state_indices,
        query_start_loc,
        states,
        num_rows,
        *k.stride()[:2],
        *v.stride()[:2],
        **sizes,
        BT=tiles.BT,
        PRECISION=tiles.PRECISION,
        **options,
    )
    _chunk_scan_kernel[(num_v, num_heads, num_rows)](
        slopes,
        state,
        state_indices,
        has_initial_state,
        query_start_loc,
        states,
        *state.stride()[:3],
        **sizes,
        **options,
    )
    _chunk_output_kernel[(num_chunks * (CHUNK // tiles.BT), num_heads, num_v)](
        q,
        k,
        v,
        slopes,
        state_indices,
        query_start_loc,
        states,
        out,
        scale,
        num_rows,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        **sizes,
        BT=tiles.BT,
        DOT=tiles.DOT,
        PRECISION=tiles.PRECISION,
        **options,
    )
    return out


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    state_indices: Tensor,
    has_initial_state: Tensor,
    out: Tensor,
) -> Tensor:
    """Contract: `Kernels.lightning_decode`."""
    num_heads, head_dim = q.shape[1:]
    value_dim = v.shape[2]
    tiles = tiles_for(q, v)
    grid = (triton.cdiv(value_dim, tiles.BV), num_heads, state_indices.shape[0])
    if 0 in grid:
        return out
    _decode_kernel[grid](
        q,
        k,
        v,
        slopes,
        state,
        state_indices,
        has_initial_state,
        out,
        scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        *state.stride()[:3],
        K=head_dim,
        V=value_dim,
        BK=tiles.BK,
        BV=tiles.BV,
        num_warps=4,
        num_stages=2,
    )
    return out
