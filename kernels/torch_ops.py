"""The operations in plain PyTorch: any device, no compiler; what a CPU serves with. See `Kernels` for the
contracts.

Small index tensors are read on the host to choose the cheaper path. On a CPU that is free; on a GPU it would
synchronise, and `triton_ops` is the module for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention.reference import decode as attention_decode
from .attention.reference import prefill as attention_prefill
from .attention.reference import token_rows
from .lightning.reference import chunked_prefill as lightning_prefill
from .lightning.reference import decode as lightning_decode
from .lightning.reference import fold as lightning_fold
from .lightning.reference import replay_decode as lightning_replay
from .lightning.reference import segments as lightning_segments
from .lightning.reference import snapshot as lightning_snapshot
from .lightning.reference import verify as lightning_verify

__all__ = [
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "gated_rms_norm",
    "lightning_decode",
    "lightning_fold",
    "lightning_prefill",
    "lightning_replay",
    "lightning_segments",
    "lightning_snapshot",
    "lightning_verify",
    "linear",
    "moe",
    "rms_norm",
    "rope_and_store_kv",
    "route",
    "sample",
    "silu_",
    "silu_and_mul",
]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K] -> [T, N]. Contract: `Kernels.linear`."""
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] -> [..., d] (Zhang and Sennrich 2019). Contract: `Kernels.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) with h = alpha * residual + beta * x. Contract: `Kernels.add_rms_norm`."""
    if x.dtype == torch.float32 and alpha == 1.0:
        h = torch.add(residual, x, alpha=beta)
    else:
        h = torch.add(residual.float() * alpha, x.float(), alpha=beta).to(x.dtype)
    return rms_norm(h, weight, eps), h


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, num_groups: int = 1) -> Tensor:
    """x, gate [T, W] -> [T, W]. Contract: `Kernels.gated_rms_norm`."""
    groups = x.float().unflatten(-1, (num_groups, -1))
    normed = F.rms_norm(groups, groups.shape[-1:], None, eps).flatten(-2)
    return normed.mul_(weight).mul_(torch.sigmoid(gate.float())).to(x.dtype)


def rope_and_store_kv(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Rotates key in place on its way. Contract: `Kernels.rope_and_store_kv`."""
    cos, sin = cos_sin.index_select(0, positions)[:, None, :].chunk(2, dim=-1)  # [T, 1, R/2] each
    _rotate(q, cos, sin)
    _rotate(key, cos, sin)
    if -1 in slot_mapping.tolist():
        real = (slot_mapping >= 0).nonzero()[:, 0]
        key, value, slot_mapping = key[real], value[real], slot_mapping[real]
    token_rows(key_cache).index_copy_(0, slot_mapping, key)
    token_rows(value_cache).index_copy_(0, slot_mapping, value)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn channel pairs (j, j + R/2) of x [T, H, D] in place (Su et al. 2021); cos, sin: [T, 1, R/2] float32."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = torch.addcmul(first * cos, second, sin, value=-1.0)
    second.copy_(torch.addcmul(second * cos, first, sin))
    first.copy_(rotated)


def silu_(x: Tensor) -> Tensor:
    """x [T, W] in place. Contract: `Kernels.silu_`."""
    return F.silu(x, inplace=True)


def silu_and_mul(x: Tensor) -> Tensor:
    """x [T, 2F] = [gate | up] -> silu(gate) * up, [T, F] (SwiGLU, Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    if x.dtype == torch.float32:
        return F.silu(gate).mul_(up)
    return F.silu(gate.float()).mul_(up).to(x.dtype)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax is monotonic, and renormalised it is the softmax over the chosen ones. Contract: `Kernels.route`."""
    chosen, experts = logits.topk(top_k, dim=-1)
    return chosen.softmax(dim=-1), experts


def moe(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Each used expert once, over its tokens. Contract: `Kernels.moe`."""
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
            # [n, d] @ [d, 2F] -> [n, 2F];  [n, F] @ [F, d] -> [n, d]
            outputs[rows] = F.linear(silu_and_mul(F.linear(inputs[rows], gate_up[expert])), down[expert])
            start += count
    by_token = torch.empty_like(outputs).index_copy_(0, order, outputs).view(*experts.shape, x.shape[1])  # [T, k, d]
    # [T, 1, k] @ [T, k, d] -> [T, 1, d], summed in float32
    return torch.bmm(weights[:, None, :], by_token.float())[:, 0].to(x.dtype)


def _moe_one_token(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """x [1, d]: the chosen experts' matrices are used where they lie."""
    total = None
    for expert, weight in zip(experts[0].tolist(), weights[0].tolist(), strict=True):
        y = F.linear(silu_and_mul(F.linear(x, gate_up[expert])), down[expert]).float()
        total = y.mul_(weight) if total is None else total.add_(y, alpha=weight)
    assert total is not None, "top_k is at least 1"
    return total.to(x.dtype)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Filters by sorting, then inverse transform in the order of the vocabulary. Contract: `Kernels.sample`."""
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
