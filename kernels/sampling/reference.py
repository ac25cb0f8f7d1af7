"""The token drawn from each row of logits, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Filters by sorting, then inverse transform in the order of the vocabulary. Contract: `Sample`."""
    x = logits.float()
    best, tokens = x.max(dim=-1)
    is_drawn = temperature > 0
    if is_drawn.any():
        weights = torch.exp((x - best[:, None]) / torch.where(is_drawn, temperature, 1.0)[:, None])
        weights = _cut_tail(weights.masked_fill_(weights < min_p[:, None], 0.0), top_k, top_p)
        sums = weights.cumsum(dim=-1)
        places = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
        # float32 rounding may push a point past the last kept token
        last = weights.shape[1] - 1 - (weights > 0).flip(-1).to(torch.int8).argmax(dim=-1, keepdim=True)
        tokens = torch.where(is_drawn, torch.minimum(places, last)[:, 0], tokens)
    is_valid = torch.isfinite(best) & ~torch.isnan(x).any(dim=-1)
    return torch.where(is_valid, tokens, -1).to(torch.int32)


def _cut_tail(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero what top-k, and then top-p, exclude. weights: [N, V], the largest of each row 1; equals stay together."""
    limits = (top_k > 0) & (top_k < weights.shape[1])
    if limits.any():
        order = weights.sort(dim=-1, descending=True).values
        least = order.gather(1, torch.where(limits, top_k, 1)[:, None].long() - 1)
        weights = weights.masked_fill((weights < least) & limits[:, None], 0.0)
    if (top_p < 1).any():
        order = weights.sort(dim=-1, descending=True).values
        sums = order.cumsum(dim=-1)
        kept = (sums - order < top_p[:, None] * sums[:, -1:]) & (order > 0)
        kept[:, 0] = True
        least = torch.where(kept, order, torch.inf).amin(dim=-1, keepdim=True)
        weights = weights.masked_fill((weights < least) & (top_p < 1)[:, None], 0.0)
    return weights
