"""From a row of logits to a token, one program per row, without sorting.

With e_i = exp((x_i - max x) / temperature), each of min-p, top-k and top-p keeps a prefix of the tokens in descending
order, so a row needs only the logit where the prefix ends. An interval of logits is narrowed around it, several pivots
at a time. Then the row's uniform number is looked up in the running sum of the kept e_i, in the order of the vocabulary
(inverse transform sampling).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EXP_RANGE = tl.constexpr(104.0)  # exp(-104) is 0 in float32
MAX_ROUNDS = tl.constexpr(64)  # of narrowing; about five are needed
SLACK = tl.constexpr(2.0**-20)  # share of the mass that top-p may keep too much; the sums are no more exact


@triton.jit
def _load(p_x, i, V, BV: tl.constexpr):
    """Logits i .. i + BV as float32, -inf past the end."""
    o_v = i + tl.arange(0, BV)
    return tl.load(p_x + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _weight(b_x, top, inverse, min_p):
    """e of logits, 0 where min-p cuts them."""
    b_e = tl.exp((b_x - top) * inverse)
    return tl.where(b_e >= min_p, b_e, 0.0)


@triton.jit
def _find_best(p_x, V, BV: tl.constexpr, STAGES: tl.constexpr):
    """(largest logit, the first token that has it, whether every logit is a number below infinity)."""
    b_best = tl.full([BV], float("-inf"), tl.float32)
    b_token = tl.zeros([BV], tl.int32)
    b_bad = tl.zeros([BV], tl.int32)
    for i in tl.range(0, V, BV, num_stages=STAGES):
        b_x = _load(p_x, i, V, BV)
        b_bad |= ((b_x != b_x) | (b_x == float("inf"))).to(tl.int32)
        b_token = tl.where(b_x > b_best, i + tl.arange(0, BV), b_token)
        b_best = tl.maximum(b_best, b_x)
    top = tl.max(b_best)
    token = tl.min(tl.where(b_best == top, b_token, V))
    return top, token, (tl.max(b_bad) == 0) & (top > float("-inf"))


@triton.jit
def _weights(b_x, top, inverse, min_p, COUNT: tl.constexpr):
    """What a token adds to a prefix: 1, or its e."""
    return (b_x > float("-inf")).to(tl.float32) if COUNT else _weight(b_x, top, inverse, min_p)


@triton.jit
def _mass(p_x, threshold, top, inverse, min_p, COUNT: tl.constexpr, V, BV: tl.constexpr, STAGES: tl.constexpr):
    """Sum of e, or number of tokens, from `threshold` up."""
    b_sum = tl.zeros([BV], tl.float32)
    for i in tl.range(0, V, BV, num_stages=STAGES):
        b_x = _load(p_x, i, V, BV)
        b_sum += tl.where(b_x >= threshold, _weights(b_x, top, inverse, min_p, COUNT), 0.0)
    return tl.sum(b_sum)


@triton.jit
def _tighten(low, mass_low, high, mass_high, pivot, mass, wanted):
    """The interval once `mass` is known to lie above `pivot`."""
    is_low = (mass >= wanted) & (pivot > low)
    is_high = (mass < wanted) & (pivot < high)
    low, mass_low = tl.where(is_low, pivot, low), tl.where(is_low, mass, mass_low)
    high, mass_high = tl.where(is_high, pivot, high), tl.where(is_high, mass, mass_high)
    return low, mass_low, high, mass_high


@triton.jit
def _narrow(p_x, wanted, low, top, inverse, min_p, COUNT: tl.constexpr, V, BV: tl.constexpr, STAGES: tl.constexpr):
    """The largest logit t in [low, top] with _mass(t) >= wanted, or `low` when even that has less.

    The interval [low, high) holds t, and the masses above its ends are known. Each round measures four pivots: two cut
    it evenly, two lie close around where a straight line between its ends meets `wanted`.
    """
    mass_high = _mass(p_x, top, top, inverse, min_p, COUNT, V, BV, STAGES)
    threshold = top
    if mass_high < wanted:
        high = top
        mass_low = _mass(p_x, low, top, inverse, min_p, COUNT, V, BV, STAGES)
        slack = 0.0 if COUNT else wanted * SLACK
        rounds = 0
        while rounds < MAX_ROUNDS:
            meets = (mass_low - wanted) / tl.maximum(mass_low - mass_high, 1e-30)
            meets = tl.minimum(tl.maximum(meets, 1.0 / 512), 511.0 / 512)
            spread = tl.minimum(meets, 1.0 - meets) / 16
            width = high - low
            pivot_0, pivot_1 = low + width * (1.0 / 3), low + width * (2.0 / 3)
            pivot_2, pivot_3 = low + width * (meets - spread), low + width * (meets + spread)
            b_mass_0 = tl.zeros([BV], tl.float32)
            b_mass_1 = tl.zeros([BV], tl.float32)
            b_mass_2 = tl.zeros([BV], tl.float32)
            b_mass_3 = tl.zeros([BV], tl.float32)
            b_least = tl.full([BV], float("inf"), tl.float32)
            b_most = tl.full([BV], float("-inf"), tl.float32)
            for i in tl.range(0, V, BV, num_stages=STAGES):
                b_x = _load(p_x, i, V, BV)
                b_w = _weights(b_x, top, inverse, min_p, COUNT)
                b_mass_0 += tl.where(b_x >= pivot_0, b_w, 0.0)
                b_mass_1 += tl.where(b_x >= pivot_1, b_w, 0.0)
                b_mass_2 += tl.where(b_x >= pivot_2, b_w, 0.0)
                b_mass_3 += tl.where(b_x >= pivot_3, b_w, 0.0)
                b_least = tl.minimum(b_least, tl.where(b_x >= low, b_x, float("inf")))
                b_most = tl.maximum(b_most, tl.where(b_x < high, b_x, float("-inf")))
            least, most = tl.min(b_least), tl.max(b_most)
            if least >= most:  # one value is left, or none
                low = tl.minimum(least, high)
                rounds = MAX_ROUNDS
            else:
                low, mass_low, high, mass_high = _tighten(
                    low, mass_low, high, mass_high, pivot_0, tl.sum(b_mass_0), wanted
                )
                low, mass_low, high, mass_high = _tighten(
                    low, mass_low, high, mass_high, pivot_1, tl.sum(b_mass_1), wanted
                )
                low, mass_low, high, mass_high = _tighten(
                    low, mass_low, high, mass_high, pivot_2, tl.sum(b_mass_2), wanted
                )
                low, mass_low, high, mass_high = _tighten(
                    low, mass_low, high, mass_high, pivot_3, tl.sum(b_mass_3), wanted
                )
                low = tl.maximum(low, least)
                rounds = tl.where(mass_low - wanted <= slack, MAX_ROUNDS, rounds + 1)
        threshold = low
    return threshold


@triton.jit
def _look_up(p_x, point, threshold, top, inverse, min_p, best, V, BV: tl.constexpr):
    """The first token at which the running sum of the kept e exceeds `point`; if rounding hides it, the last kept."""
    token = best
    passed = 0.0
    i = 0
    found = 0
    while (i < V) & (found == 0):
        b_x = _load(p_x, i, V, BV)
        b_w = tl.where(b_x >= threshold, _weight(b_x, top, inverse, min_p), 0.0)
        o_v = i + tl.arange(0, BV)
        total = tl.sum(b_w)
        if passed + total > point:
            b_after = passed + tl.cumsum(b_w, axis=0)
            first = tl.min(tl.where((b_after > point) & (b_w > 0.0), o_v, V))
            found = (first < V).to(tl.int32)
            token = tl.where(first < V, first, token)
        if found == 0:
            last = tl.max(tl.where(b_w > 0.0, o_v, -1))
            token = tl.where(last >= 0, last, token)
        passed += total
        i += BV
    return token


@triton.jit
def _sample_kernel(
    p_x,
    p_temperature,
    p_top_k,
    p_top_p,
    p_min_p,
    p_uniform,
    p_token,
    V,
    x_t,
    BV: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BV logits at a time, BP where pivots are measured."""
    i_t = tl.program_id(0)
    p_x += i_t.to(tl.int64) * x_t
    top, token, valid = _find_best(p_x, V, BV, STAGES)
    temperature = tl.load(p_temperature + i_t)
    if (temperature > 0.0) & valid:
        inverse = 1.0 / temperature
        top_k, top_p, min_p = tl.load(p_top_k + i_t), tl.load(p_top_p + i_t), tl.load(p_min_p + i_t)
        threshold = top - EXP_RANGE * temperature
        if (top_k > 0) & (top_k < V):
            threshold = _narrow(p_x, top_k.to(tl.float32), threshold, top, inverse, min_p, True, V, BP, STAGES)
        if top_p < 1.0:
            total = _mass(p_x, threshold, top, inverse, min_p, False, V, BV, STAGES)
            threshold = _narrow(p_x, top_p * total, threshold, top, inverse, min_p, False, V, BP, STAGES)
        point = tl.load(p_uniform + i_t) * _mass(p_x, threshold, top, inverse, min_p, False, V, BV, STAGES)
        token = _look_up(p_x, point, threshold, top, inverse, min_p, token, V, BV)
    tl.store(p_token + i_t, tl.where(valid, token, -1))


TILE = (8192, 1024, 8, 3, 16)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """logits [N, V] -> tokens [N] int32. Contract: `Sample`."""
    num_rows, vocab = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        block = max(64, triton.next_power_of_2(vocab))
        _sample_kernel[(num_rows,)](
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            uniform,
            tokens,
            vocab,
            logits.stride(0),
            BV=min(block, TILE[0]),
            BP=min(block, TILE[1]),
            STAGES=TILE[3],
            num_warps=min(TILE[4], block // 64),
        )
    return tokens
