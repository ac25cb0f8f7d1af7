"""A mixture of experts in plain PyTorch.

The number of tokens of each expert is read on the host, which costs nothing where it lives on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bundles import Weight
from ..dense.reference import linear, silu_and_mul


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax is monotonic, and renormalised it is the softmax over the chosen ones. Contract: `Experts.route`."""
    chosen, experts = logits.topk(top_k, dim=-1)
    return chosen.softmax(dim=-1), experts


def route_groups(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """logits [T, E], bias [E] -> weights, experts [T, k]. Contract: `Experts.route_groups`."""
    scores = torch.sigmoid(logits)
    choice = scores + bias
    if top_groups < num_groups:
        groups = choice.unflatten(-1, (num_groups, -1))  # [T, N, E / N]
        best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1).topk(top_groups, dim=-1).indices
        is_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
        choice = groups.masked_fill(is_out[..., None], -torch.inf).flatten(-2)
    experts = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * scale, experts


def moe(x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
    """Each used expert once, over its tokens. Contract: `Experts.moe`."""
    if x.shape[0] == 1:
        return _moe_one_token(x, gate_up, down, weights, experts)
    top_k = experts.shape[1]
    order = experts.flatten().argsort(stable=True)  # [T * k], pairs grouped by expert
    counts = torch.bincount(experts.flatten(), minlength=gate_up.shape[0]).tolist()
    inputs = x.index_select(0, order // top_k)  # [T * k, d]
    outputs = torch.empty_like(inputs)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            outputs[rows] = _expert(inputs[rows], gate_up.expert(expert), down.expert(expert))
            start += count
    by_token = torch.empty_like(outputs).index_copy_(0, order, outputs).view(*experts.shape, x.shape[1])  # [T, k, d]
    # [T, 1, k] @ [T, k, d] -> [T, 1, d], summed in float32
    return torch.bmm(weights[:, None, :], by_token.float())[:, 0].to(x.dtype)


def _expert(x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """x [n, d], gate_up [2F, d], down [d, F] -> [n, d]."""
    # [n, d] @ [d, 2F] -> [n, 2F];  [n, F] @ [F, d] -> [n, d]
    return linear(silu_and_mul(linear(x, gate_up)), down)


def _moe_one_token(x: Tensor, gate_up: Weight, down: Weight, weights: Tensor, experts: Tensor) -> Tensor:
    """x [1, d]: the chosen experts' matrices are used where they lie."""
    total = None
    for expert, weight in zip(experts[0].tolist(), weights[0].tolist(), strict=True):
        y = _expert(x, gate_up.expert(expert), down.expert(expert)).float()
        total = y.mul_(weight) if total is None else total.add_(y, alpha=weight)
    assert total is not None, "top_k is at least 1"
    return total.to(x.dtype)
