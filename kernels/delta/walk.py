"""Third launch of a prompt: the state goes from chunk to chunk.

A program owns a row, a value head and BV of its channels. With the state S [K, BV] in registers, a chunk does

    U = A (V - e^c K S),   O = scale e^c Q S + P U,   S = e^{c_m} S + (e^{c_m - c} K)^T U.

Transposed, S is [BV, K] and the left operand of its products: these take it from registers, and two programs fit a
processor. Else narrower tiles make more programs of few rows, and each chunk is over sooner.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..bundles import Rows
from ..lightning.tile import num_processors, padded
from .contract import CHUNK, TAPS, DeltaInputs, DeltaState
from .prepare import Prepared


class WalkTiles(NamedTuple):
    """BV channels of a value head per program, how it holds its state, and launch options."""

    BV: int
    TRANSPOSED: bool
    num_warps: int
    num_stages: int


def walk_tiles(x: Tensor, num_rows: int, num_heads: int, V: int) -> WalkTiles:
    """Tiles for `num_rows` rows of x's dtype."""
    if x.dtype == torch.float32:
        return WalkTiles(min(padded(V), 16), False, 4, 1)
    programs = num_rows * num_heads * triton.cdiv(V, 64)
    if V > 32 and 4 * programs >= 3 * num_processors(x.device):
        return WalkTiles(64, True, 4, 2)
    return WalkTiles(min(padded(V), 32), False, 4, 3)


@triton.jit
def _times(b_m, b_y, b_acc, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """b_acc + m y; transposed, b_y is y^T, and b_acc and the result are too."""
    if TRANSPOSED:
        b_acc = tl.dot(b_y, tl.trans(b_m), b_acc, input_precision=PRECISION)
    else:
        b_acc = tl.dot(b_m, b_y, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def _outer(a, b, TRANSPOSED: tl.constexpr):
    """Vectors of tokens or keys, and of values, along their axes of a tile."""
    if TRANSPOSED:
        b_a, b_b = a[None, :], b[:, None]
    else:
        b_a, b_b = a[:, None], b[None, :]
    return b_a, b_b


@triton.jit
def _keep_tail(p_to, p_from, p_raw, raw_t, context, n, o_c, m_c, C: tl.constexpr, TAPS: tl.constexpr):
    """Raw values at channels o_c of the last three of n tokens, each to its place in the tail p_to; of tokens before
    the row's first, from the tail p_from."""
    for j in tl.static_range(1, TAPS):
        place = (context + n - j + TAPS) % TAPS * C
        if n >= j:
            b_raw = tl.load(p_raw + (n - j).to(tl.int64) * raw_t + o_c, mask=m_c, other=0.0)
        else:
            b_raw = tl.load(p_from + place + o_c, mask=m_c & (context + n >= j), other=0.0)
        tl.store(p_to + place + o_c, b_raw.to(p_to.dtype.element_ty), mask=m_c)


@triton.jit
def _stops(p_places, num_places, i_b, BP: tl.constexpr):
    """Row i_b's places, which lie together: the first one, and how many."""
    o = tl.arange(0, BP)
    is_own = tl.load(p_places + 3 * o, mask=o < num_places, other=-1) == i_b
    is_own &= tl.load(p_places + 3 * o + 2, mask=o < num_places, other=-1) >= 0
    return tl.min(tl.where(is_own, o, BP), axis=0), tl.sum(is_own.to(tl.int32), axis=0)


@triton.jit(
    do_not_specialize=["num_places"],
    do_not_specialize_on_alignment=["p_slots", "p_continues", "p_contexts", "p_starts", "p_places"],
)
def _walk_kernel(
    p_raw,
    p_x,
    p_decay,
    p_inverse,
    p_score,
    p_state,
    p_tail,
    p_slots,
    p_continues,
    p_contexts,
    p_starts,
    p_places,
    p_saved_state,
    p_saved_tail,
    p_o,
    scale,
    num_places,
    raw_t,
    state_n,
    tail_n,
    saved_state_n,
    saved_tail_n,
    o_t,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    TAPS: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    num_stages: tl.constexpr,
):
    i_v, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    C: tl.constexpr = 2 * HK * K + HV * V
    i_k = i_h // (HV // HK)
    start = tl.load(p_starts + i_b).to(tl.int64)
    n = (tl.load(p_starts + i_b + 1) - start).to(tl.int32)
    slot = tl.load(p_slots + i_b).to(tl.int64)
    o, o_k = tl.arange(0, CHUNK), tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    t_o, v_o = _outer(o, o_v, TRANSPOSED)
    k_s, v_s = _outer(o_k, o_v, TRANSPOSED)
    p_o += start * o_t + i_h * V
    if slot < 0:
        for t in range(0, n, CHUNK):
            p_zero = p_o + tl.cast(t, tl.int64) * o_t + (t_o * o_t + v_o)
            tl.store(p_zero, tl.zeros_like(t_o + v_o).to(p_o.dtype.element_ty), mask=(t_o < n - t) & (v_o < V))
        return
    if n == 0:
        return
    context = tl.where(tl.load(p_continues + i_b), tl.load(p_contexts + i_b), 0)
    p_raw += start * raw_t
    p_x += start * C
    p_decay += start * HV + i_h
    p_inverse += (start * HV + i_h) * CHUNK
    p_score += (start * HV + i_h) * CHUNK
    p_tail += slot * tail_n
    c_q = i_k * K + o_k
    c_v = 2 * HK * K + i_h * V + o_v
    at_q = o[:, None] * C + c_q[None, :]
    at_v = t_o * C + (2 * HK * K + i_h * V + v_o)
    at_a = o[:, None] * (HV * CHUNK) + o[None, :]
    at_s = i_h * (V * K) + v_s * K + k_s
    m_q, m_s = (o_k < K)[None, :], (k_s < K) & (v_s < V)
    # Queries' and keys' tails belong to one of the programs that share them.
    m_tail = (o_k < K) & (i_v == 0) & (i_h % (HV // HK) == 0)
    b_s = tl.zeros_like(k_s + v_s).to(tl.float32)
    if context > 0:
        b_s = tl.load(p_state + slot * state_n + at_s, mask=m_s, other=0.0).to(tl.float32)

    place, num_stops = 0, 0
    if BP > 0:
        place, num_stops = _stops(p_places, num_places, i_b, BP)
    first = 0
    shift = context % CHUNK  # the row's first token lies so far in a chunk of its sequence
    for i in range(0, num_stops + 1):  # up to each place, then to the row's end
        stop = n
        if i < num_stops:
            stop = tl.load(p_places + 3 * (place + i) + 1)
        for t in tl.range((first + shift) // CHUNK * CHUNK, stop + shift, CHUNK, num_stages=num_stages):
            begin = tl.maximum(t - shift, first)
            end = tl.minimum(t - shift + CHUNK, stop)
            token = begin.to(tl.int64)
            m, m_t = o < end - begin, t_o < end - begin
            b_k = tl.load(p_x + token * C + (HK * K + at_q), mask=m[:, None] & m_q, other=0.0)
            b_q = tl.load(p_x + token * C + at_q, mask=m[:, None] & m_q, other=0.0)
            b_v = tl.load(p_x + token * C + at_v, mask=m_t & (v_o < V), other=0.0)
            b_a = tl.load(p_inverse + token * (HV * CHUNK) + at_a, mask=m[:, None], other=0.0)
            b_p = tl.load(p_score + token * (HV * CHUNK) + at_a, mask=m[:, None], other=0.0)
            b_c = tl.load(p_decay + token * HV + o * HV, mask=m, other=0.0)
            c_m = tl.load(p_decay + (end - 1).to(tl.int64) * HV)
            b_in, _ = _outer(tl.exp(b_c), o_v, TRANSPOSED)
            b_out, _ = _outer(tl.exp(tl.minimum(c_m - b_c, 0.0)), o_v, TRANSPOSED)
            b_low = b_s.to(b_k.dtype)
            b_zero = tl.zeros_like(b_v).to(tl.float32)
            # [CHUNK, BK] @ [BK, BV] -> [CHUNK, BV]
            b_d = b_v.to(tl.float32) - _times(b_k, b_low, b_zero, TRANSPOSED, PRECISION) * b_in
            b_o = _times(b_q, b_low, b_zero, TRANSPOSED, PRECISION) * (b_in * scale)
            # [CHUNK, CHUNK] @ [CHUNK, BV] -> [CHUNK, BV]
            b_u = _times(b_a, b_d.to(b_k.dtype), b_zero, TRANSPOSED, PRECISION)
            b_o = _times(b_p, b_u.to(b_k.dtype), b_o, TRANSPOSED, PRECISION)
            p_out = p_o + token * o_t + (t_o * o_t + v_o)
            tl.store(p_out, b_o.to(p_o.dtype.element_ty), mask=m_t & (v_o < V))
            # [BK, CHUNK] @ [CHUNK, BV] -> [BK, BV]
            b_u = (b_u * b_out).to(b_k.dtype)
            b_s = _times(tl.trans(b_k), b_u, b_s * tl.exp(c_m), TRANSPOSED, PRECISION)
        first = stop
        if i < num_stops:
            saved = tl.load(p_places + 3 * (place + i) + 2).to(tl.int64)
            p_saved = p_saved_tail + saved * saved_tail_n
            tl.store(p_saved_state + saved * saved_state_n + at_s, b_s.to(p_saved_state.dtype.element_ty), mask=m_s)
            _keep_tail(p_saved, p_tail, p_raw, raw_t, context, stop, c_q, m_tail, C, TAPS)
            _keep_tail(p_saved, p_tail, p_raw, raw_t, context, stop, HK * K + c_q, m_tail, C, TAPS)
            _keep_tail(p_saved, p_tail, p_raw, raw_t, context, stop, c_v, o_v < V, C, TAPS)
    tl.store(p_state + slot * state_n + at_s, b_s.to(p_state.dtype.element_ty), mask=m_s)
    _keep_tail(p_tail, p_tail, p_raw, raw_t, context, n, c_q, m_tail, C, TAPS)
    _keep_tail(p_tail, p_tail, p_raw, raw_t, context, n, HK * K + c_q, m_tail, C, TAPS)
    _keep_tail(p_tail, p_tail, p_raw, raw_t, context, n, c_v, o_v < V, C, TAPS)


def walk(
    x: Tensor,
    prepared: Prepared,
    inputs: DeltaInputs,
    pool: DeltaState,
    rows: Rows,
    context_lens: Tensor,
    places: Tensor,
    snapshots: DeltaState,
    out: Tensor,
    dims: tuple[int, int, int, int],
) -> None:
    """x: the result of `convolve`. dims: Hk, Hv, K, V. Writes `out`, states, tails and snapshots."""
    key_heads, num_heads, K, V = dims
    num_rows, num_places = rows.slots.shape[0], places.shape[0]
    tiles = walk_tiles(x, num_rows, num_heads, V)
    _walk_kernel[(triton.cdiv(V, tiles.BV), num_heads, num_rows)](
        inputs.raw,
        x,
        *prepared,
        *pool,
        rows.slots,
        rows.continues,
        context_lens,
        rows.starts,
        places,
        *snapshots,
        out,
        K**-0.5,
        num_places,
        inputs.raw.stride(0),
        *(part.stride(0) for part in (*pool, *snapshots)),
        out.stride(0),
        HK=key_heads,
        HV=num_heads,
        K=K,
        V=V,
        CHUNK=CHUNK,
        TAPS=TAPS,
        BP=max(16, triton.next_power_of_2(num_places)) if num_places else 0,  # few kinds to compile
        BK=padded(K),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        **tiles._asdict(),
    )
