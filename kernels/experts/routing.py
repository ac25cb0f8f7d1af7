"""A token's choice of experts, and the (token, expert) pairs in the order of their experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    p_logits,
    p_weights,
    p_experts,
    num_tokens,
    l_t,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
):
    """The softmax over all experts, renormalised over the chosen ones, is the softmax over the chosen ones."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_k, o_e = tl.arange(0, BK), tl.arange(0, BE)
    m_t = o_t < num_tokens
    p_logits += o_t[:, None] * l_t + o_e[None, :]
    b_logits = tl.load(p_logits, mask=m_t[:, None] & (o_e < E)[None, :], other=0.0)
    b_logits = tl.where((o_e < E)[None, :], b_logits, float("-inf"))
    b_top = tl.max(b_logits, axis=1)
    b_experts = tl.zeros([BT, BK], tl.int32)
    b_weights = tl.zeros([BT, BK], tl.float32)
    for i_k in range(TOP_K):
        b_max, b_e = tl.max(b_logits, axis=1, return_indices=True)  # of equals the first
        b_e = tl.minimum(b_e, E - 1)  # whatever a NaN did to the comparisons
        b_experts = tl.where((o_k == i_k)[None, :], b_e[:, None], b_experts)
        b_weights = tl.where((o_k == i_k)[None, :], tl.exp(b_max - b_top)[:, None], b_weights)
        b_logits = tl.where(o_e[None, :] == b_e[:, None], float("-inf"), b_logits)
    b_weights /= tl.sum(b_weights, axis=1)[:, None]
    o_pair = o_t[:, None] * TOP_K + o_k[None, :]
    m_pair = m_t[:, None] & (o_k < TOP_K)[None, :]
    tl.store(p_weights + o_pair, b_weights, mask=m_pair)
    tl.store(p_experts + o_pair, b_experts, mask=m_pair)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """logits [T, E] float32 -> weights [T, k] float32, experts [T, k] int64. Contract: `Experts.route`."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    if num_tokens:
        BT = 1  # a token's warp finds each maximum without a barrier
        _route_kernel[(triton.cdiv(num_tokens, BT),)](
            logits,
            weights,
            experts,
            num_tokens,
            logits.stride(0),
            TOP_K=top_k,
            E=num_experts,
            BT=BT,
            BK=triton.next_power_of_2(top_k),
            BE=max(16, triton.next_power_of_2(num_experts)),
            num_warps=1,
        )
    return weights, experts


@triton.jit
def _best_groups(b_choice, TOP_GROUPS: tl.constexpr, NUM_GROUPS: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr):
    """b_choice [BT, BN, BG] with -inf for all experts of a group that is not among the best."""
    o_n, o_g = tl.arange(0, BN), tl.arange(0, BG)
    b_first, b_g = tl.max(b_choice, axis=2, return_indices=True)
    b_second = tl.max(tl.where(o_g[None, None, :] == b_g[:, :, None], float("-inf"), b_choice), axis=2)
    b_group = b_first + tl.where(b_second == float("-inf"), 0.0, b_second)  # [BT, BN]
    b_group = tl.where((o_n < NUM_GROUPS)[None, :], b_group, float("-inf"))
    b_kept = tl.zeros(b_group.shape, tl.int32)
    for _ in range(TOP_GROUPS):
        _, b_n = tl.max(b_group, axis=1, return_indices=True)  # of equals the first
        is_best = o_n[None, :] == b_n[:, None]
        b_kept = tl.where(is_best, 1, b_kept)
        b_group = tl.where(is_best, float("-inf"), b_group)
    return tl.where((b_kept == 1)[:, :, None], b_choice, float("-inf"))


@triton.jit(do_not_specialize=["num_tokens"])
def _route_groups_kernel(
    p_logits,
    p_bias,
    p_weights,
    p_experts,
    num_tokens,
    scale,
    l_t,
    TOP_K: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
):
    """SIZE experts a group. A tile is [BT, BN, BG]: tokens, groups, places within a group."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_k, o_n, o_g, o_p = tl.arange(0, BK), tl.arange(0, BN), tl.arange(0, BG), tl.arange(0, BN * BG)
    m_t = o_t < num_tokens
    o_e = o_n[:, None] * SIZE + o_g[None, :]
    m_e = (o_n < NUM_GROUPS)[:, None] & (o_g < SIZE)[None, :]
    p_logits += o_t[:, None, None] * l_t + o_e[None, :, :]
    b_logits = tl.load(p_logits, mask=m_t[:, None, None] & m_e[None, :, :], other=0.0)
    b_score = 1.0 / (1.0 + tl.exp(-b_logits))
    b_choice = b_score + tl.load(p_bias + o_e, mask=m_e, other=0.0)[None, :, :]
    b_choice = tl.where(m_e[None, :, :], b_choice, float("-inf"))
    if TOP_GROUPS < NUM_GROUPS:
        b_choice = _best_groups(b_choice, TOP_GROUPS, NUM_GROUPS, BN, BG)
    b_score = tl.reshape(b_score, [BT, BN * BG])
    b_choice = tl.reshape(b_choice, [BT, BN * BG])
    b_experts = tl.zeros([BT, BK], tl.int32)
    b_weights = tl.zeros([BT, BK], tl.float32)
    for i_k in range(TOP_K):
        _, b_p = tl.max(b_choice, axis=1, return_indices=True)  # of equals the first
        is_best = o_p[None, :] == b_p[:, None]
        b_e = tl.minimum(b_p // BG * SIZE + b_p % BG, NUM_GROUPS * SIZE - 1)  # whatever a NaN did to the comparisons
        b_weight = tl.sum(tl.where(is_best, b_score, 0.0), axis=1)
        b_experts = tl.where((o_k == i_k)[None, :], b_e[:, None], b_experts)
        b_weights = tl.where((o_k == i_k)[None, :], b_weight[:, None], b_weights)
        b_choice = tl.where(is_best, float("-inf"), b_choice)
    b_weights = b_weights / (tl.sum(b_weights, axis=1) + 1e-20)[:, None] * scale
    o_pair = o_t[:, None] * TOP_K + o_k[None, :]
    m_pair = m_t[:, None] & (o_k < TOP_K)[None, :]
    tl.store(p_weights + o_pair, b_weights, mask=m_pair)
    tl.store(p_experts + o_pair, b_experts, mask=m_pair)


def route_groups(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """logits [T, E], bias [E] -> weights, experts [T, k]. Contract: `Experts.route_groups`."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    if num_tokens:
        BT = 4
        _route_groups_kernel[(triton.cdiv(num_tokens, BT),)](
            logits,
            bias,
            weights,
            experts,
            num_tokens,
            float(scale),
            logits.stride(0),
            TOP_K=top_k,
            TOP_GROUPS=top_groups,
            NUM_GROUPS=num_groups,
            SIZE=num_experts // num_groups,
            BT=BT,
            BK=triton.next_power_of_2(top_k),
            BN=triton.next_power_of_2(num_groups),
            BG=triton.next_power_of_2(num_experts // num_groups),
            num_warps=4,
        )
    return weights, experts


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["p_experts"])
def _count_kernel(p_experts, p_counts, num_pairs, BE: tl.constexpr, BP: tl.constexpr):
    o_pair = tl.program_id(0) * BP + tl.arange(0, BP)
    b_e = tl.load(p_experts + o_pair, mask=o_pair < num_pairs, other=0).to(tl.int32)
    b_count = tl.histogram(b_e, BE, mask=o_pair < num_pairs)
    tl.store(p_counts + tl.program_id(0) * BE + tl.arange(0, BE), b_count)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"], do_not_specialize_on_alignment=["p_experts"])
def _sort_kernel(
    p_experts,
    p_counts,
    p_order,
    p_blocks,
    num_pairs,
    num_blocks,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Places the BP pairs of one chunk, stably; p_counts [chunks, BE], None where there is one chunk."""
    i_c, num_chunks = tl.program_id(0), tl.num_programs(0)
    o_pair = i_c * BP + tl.arange(0, BP)
    o_e = tl.arange(0, BE)
    b_e = tl.load(p_experts + o_pair, mask=o_pair < num_pairs, other=0).to(tl.int32)
    b_before = tl.zeros([BE], tl.int32)  # pairs of each expert in earlier chunks
    if p_counts is None:
        b_count = tl.histogram(b_e, BE, mask=o_pair < num_pairs)
    else:
        b_count = tl.zeros([BE], tl.int32)
        for i in range(0, num_chunks, BC):
            o_c = i + tl.arange(0, BC)
            b_counts = tl.load(p_counts + o_c[:, None] * BE + o_e[None, :], mask=(o_c < num_chunks)[:, None], other=0)
            b_count += tl.sum(b_counts, axis=0)
            b_before += tl.sum(tl.where((o_c < i_c)[:, None], b_counts, 0), axis=0)
    b_end = tl.cumsum(b_count, axis=0)
    b_start = b_end - b_count
    b_blocks = (b_count + BM - 1) // BM
    b_end_block = tl.cumsum(b_blocks, axis=0)

    # [BP, BP]: earlier pairs of the same expert in the chunk; places past the last pair are later than all
    b_rank = tl.sum(((b_e[None, :] == b_e[:, None]) & (o_pair[None, :] < o_pair[:, None])).to(tl.int32), axis=1)
    b_rank += tl.gather(b_before, b_e, axis=0)
    o_row = tl.gather(b_start, b_e, axis=0) + b_rank
    tl.store(p_order + o_row, o_pair, mask=o_pair < num_pairs)

    # A block is described by its first pair. A surplus block is described by the pair of its number: they are fewer.
    p_block = p_blocks + 3 * (tl.gather(b_end_block - b_blocks, b_e, axis=0) + b_rank // BM)
    m_first = (b_rank % BM == 0) & (o_pair < num_pairs)
    tl.store(p_block, b_e, mask=m_first)
    tl.store(p_block + 1, o_row, mask=m_first)
    tl.store(p_block + 2, tl.minimum(o_row + BM, tl.gather(b_end, b_e, axis=0)), mask=m_first)
    tl.store(p_blocks + 3 * o_pair, -1, mask=(tl.max(b_end_block, axis=0) <= o_pair) & (o_pair < num_blocks))


class SortedPairs(NamedTuple):
    """Pairs (t, j), numbered t * k + j, in the order of their experts, and cut into blocks of one expert each."""

    order: Tensor  # [T * k] int32: the pair at each sorted position; pairs of one expert in increasing order
    blocks: Tensor  # [N, 3] int32: expert (-1: no such block), first sorted position, end


def sort_pairs(experts: Tensor, num_experts: int, block_size: int) -> SortedPairs:
    """experts [T, k] -> the pairs sorted, in an upper bound of blocks that depends on the shapes alone."""
    num_pairs = experts.numel()
    num_blocks = min(num_pairs, num_pairs // block_size + num_experts)
    order = torch.empty(num_pairs, dtype=torch.int32, device=experts.device)
    blocks = torch.empty(num_blocks, 3, dtype=torch.int32, device=experts.device)
    BP, BE = 128, max(32, triton.next_power_of_2(num_experts))
    num_chunks = triton.cdiv(num_pairs, BP)
    experts = experts.contiguous()
    counts = None
    if num_chunks > 1:
        counts = torch.empty(num_chunks, BE, dtype=torch.int32, device=experts.device)
        _count_kernel[(num_chunks,)](experts, counts, num_pairs, BE=BE, BP=BP, num_warps=4)
    _sort_kernel[(num_chunks,)](
        experts, counts, order, blocks, num_pairs, num_blocks, BM=block_size, BE=BE, BP=BP, BC=32, num_warps=4
    )
    return SortedPairs(order, blocks)
