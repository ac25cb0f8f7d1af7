"""Runs every Triton operation, interpreted, on tensors that forbidden pages lie before and behind.

A kernel that reads or writes beyond a tensor ends the process. `python guarded.py before|behind`: on which side the
forbidden page touches. Prints the operations that came through.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch
from leyden.kernels import load
from leyden.kernels.bundles import HeadNorm, Ring, Rows, Weight
from leyden.kernels.delta.contract import DeltaInputs, DeltaRing, DeltaState, DeltaWeights
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0
OPS = load("triton")
LIBC = ctypes.CDLL(None, use_errno=True)
SIDE = sys.argv[1]
KEPT: list[mmap.mmap] = []


def guarded(tensor: Tensor) -> Tensor:
    """The same content, contiguous, with a page next to it that must not be touched."""
    num_bytes = tensor.numel() * tensor.element_size()
    inner = -(-num_bytes // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    KEPT.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + inner):
        if LIBC.mprotect(ctypes.c_void_p(page), PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE if SIDE == "before" else PAGE + inner - num_bytes
    moved = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return moved.copy_(tensor)


def normal(*shape: int) -> Tensor:
    return guarded(torch.randn(shape) * 0.3)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return guarded(torch.tensor(values, dtype=dtype))


def flags(*values: bool) -> Tensor:
    return guarded(torch.tensor(values))


def experts(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """The last expert is among each token's."""
    return guarded((num_experts - 1 - torch.arange(top_k)).repeat(num_tokens, 1))


def weight(*shape: int) -> Weight:
    return Weight(normal(*shape))


def moe(num_tokens: int, num_experts: int) -> None:
    size, width = 21, 19  # no tile divides them
    weights = weight(num_experts, 2 * width, size), weight(num_experts, size, width)
    pairs = normal(num_tokens, 2), experts(num_tokens, num_experts, 2)
    OPS.experts.moe(normal(num_tokens, size), *weights, *pairs)


HEADS, K = 3, 20
SLOPES = (0.5, 0.004, 4.0)


def rows(starts: tuple[int, ...], max_len: int) -> Rows:
    return Rows(ints(2, 0, -1, 1), flags(True, False, True, True), ints(*starts), max_len)


def lightning(operation: Callable[..., object], of: Rows, num_tokens: int, pending: tuple[int, ...] = ()) -> None:
    q, k, v, out = (normal(num_tokens, HEADS, K) for _ in range(4))
    pools = [normal(3, HEADS, K, K), *([ring(*pending)] if pending else [])]
    operation(q, k, v, guarded(torch.tensor(SLOPES)), 0.3, *pools, of, out)


def ring(*pending: int) -> Ring:
    return Ring(normal(3, HEADS, 16, K), normal(3, HEADS, 16, K), ints(*pending))


PROMPTS, DRAFTS, ONES = (0, 40, 41, 50, 52), (0, 8, 9, 13, 17), (0, 1, 2, 3, 4)


def fold() -> None:
    OPS.lightning.fold(guarded(torch.tensor(SLOPES)), normal(3, HEADS, K, K), ring(16, 0, 5), ints(2, 0, 1))


def snapshot() -> None:
    places = guarded(torch.tensor([[0, 33, 1], [3, 2, 0], [0, 1, -1]]).int())
    k, v, slopes = normal(52, HEADS, K), normal(52, HEADS, K), guarded(torch.tensor(SLOPES))
    OPS.lightning.snapshot(k, v, slopes, normal(3, HEADS, K, K), rows(PROMPTS, 40), places, normal(2, HEADS, K, K))


CHANNELS = 2 * K + 2 * 12  # of a key head and two value heads


def delta_pool() -> DeltaState:
    return DeltaState(normal(3, 2, 12, K), normal(3, 4, CHANNELS))


def delta_ring(*pending: int) -> DeltaRing:
    rings = normal(3, 1, 16, K), normal(3, 2, 16, 12), normal(3, 2, 16), normal(3, 1, 16, CHANNELS)
    return DeltaRing(*rings, ints(*pending))


def delta(operation: Callable[..., object], of: Rows, num_tokens: int, *behind: object) -> None:
    """behind: arguments between the context's lengths and the output, or the ring."""
    inputs = DeltaInputs(normal(num_tokens, CHANNELS), normal(num_tokens, 2), normal(num_tokens, 2))
    weights, contexts = DeltaWeights(normal(4, CHANNELS), normal(2), normal(2)), ints(63, 0, 9, 20)
    ring = [x for x in behind if isinstance(x, DeltaRing)]
    others = [x for x in behind if not isinstance(x, DeltaRing)]
    operation(inputs, weights, delta_pool(), *ring, of, contexts, *others, normal(num_tokens, 2, 12))


def delta_prefill() -> None:
    places = guarded(torch.tensor([[0, 1, 1], [3, 2, -1]]).int())
    delta(OPS.delta.prefill, rows(PROMPTS, 40), 52, places, DeltaState(normal(2, 2, 12, K), normal(2, 4, CHANNELS)))


def delta_fold() -> None:
    OPS.delta.fold(delta_pool(), delta_ring(16, 0, 5), ints(2, 0, 1), ints(40, 3, 5))


def attention(*, is_prefill: bool) -> None:
    caches = normal(6, 16, 2, K), normal(6, 16, 2, K)
    table, context = guarded(torch.tensor([[5, 0], [1, 3], [4, 2]]).int()), ints(30, 0, -1, 6)
    if is_prefill:
        q, out = normal(42, 6, K), normal(42, 6, K)
        OPS.attention.prefill(q, *caches, table, rows((0, 2, 31, 41, 42), 29), context, 0.3, out)
    else:
        q, out = normal(4, 6, K), normal(4, 6, K)
        OPS.attention.decode(q, *caches, table, rows(ONES, 1), context, 0.3, out)


def head_norm() -> HeadNorm:
    return HeadNorm(normal(K), normal(K), 1e-6)


def rope(*, stores: bool, norm: HeadNorm | None = None) -> None:
    q, key, value = normal(4, 6, K), normal(4, 2, K), normal(4, 2, K)
    positions, cos_sin = ints(7, 0, 2, 1, dtype=torch.int64), normal(8, 10)
    if not stores:
        OPS.attention.rope_(q, key, positions, cos_sin, norm)
        return
    caches, slots = (normal(6, 5, 2, K), normal(6, 5, 2, K)), ints(29, -1, 0, 11, dtype=torch.int64)
    OPS.attention.rope_and_store_kv(q, key, value, positions, cos_sin, *caches, slots, norm)


def sample() -> None:
    num, vocab = 3, 1037
    options = guarded(torch.tensor([0.0, 1.0, 0.7])), ints(0, 5, 0), guarded(torch.tensor([1.0, 0.9, 0.5]))
    OPS.sample(normal(num, vocab), *options, guarded(torch.tensor([0.0, 0.01, 0.0])), guarded(torch.rand(num)))


CALLS: dict[str, Callable[[], object]] = {
    "dense.linear of one": lambda: OPS.dense.linear(normal(1, 20), weight(19, 20)),
    "dense.linear of many": lambda: OPS.dense.linear(normal(33, 20), weight(19, 20)),
    "dense.rms_norm": lambda: OPS.dense.rms_norm(normal(5, 37), normal(37), 1e-5),
    "dense.add_rms_norm": lambda: OPS.dense.add_rms_norm(normal(5, 37), normal(5, 37), normal(37), 1e-5, 0.5, 2.0),
    "dense.gated_rms_norm": lambda: OPS.dense.gated_rms_norm(normal(5, 38), normal(5, 38), normal(38), 1e-5, 2),
    "dense.gated_rms_norm of heads": lambda: OPS.dense.gated_rms_norm(
        normal(5, 3 * 37), normal(5, 3 * 37), normal(37), 1e-5, 3, "silu"
    ),
    "dense.gate_": lambda: OPS.dense.gate_(normal(5, 3, 37), normal(5, 3, 37)),
    "dense.join": lambda: OPS.dense.join(normal(5, 37), normal(1, 37), normal(5, 37), normal(5, 37), is_mixed=False),
    "dense.silu_": lambda: OPS.dense.silu_(normal(5, 37)),
    "dense.silu_and_mul": lambda: OPS.dense.silu_and_mul(normal(5, 74)),
    "experts.moe of few": lambda: moe(1, 5),
    "experts.moe of many": lambda: moe(9, 5),
    "experts.route": lambda: OPS.experts.route(normal(5, 7), 2),
    "experts.route_groups": lambda: OPS.experts.route_groups(normal(5, 30), normal(30), 4, 5, 2, 2.5),
    "attention.rope_ of heads alone": lambda: rope(stores=False),
    "attention.rope_ of normed heads": lambda: rope(stores=False, norm=head_norm()),
    "attention.rope_and_store_kv of heads alone": lambda: rope(stores=True),
    "attention.rope_and_store_kv of normed heads": lambda: rope(stores=True, norm=head_norm()),
    "attention.prefill": lambda: attention(is_prefill=True),
    "attention.decode": lambda: attention(is_prefill=False),
    "lightning.minimax": lambda: lightning(OPS.lightning.minimax, rows(PROMPTS, 40), 52),
    "lightning.seg_la": lambda: lightning(OPS.lightning.seg_la, rows(PROMPTS, 40), 52),
    "lightning.decode": lambda: lightning(OPS.lightning.decode, rows(ONES, 1), 4),
    "lightning.replay": lambda: lightning(OPS.lightning.replay, rows(ONES, 1), 4, (15, 0, 0, 7)),
    "lightning.verify": lambda: lightning(OPS.lightning.verify, rows(DRAFTS, 8), 17, (3, 0, 0, 12)),
    "lightning.fold": fold,
    "lightning.snapshot": snapshot,
    "delta.prefill": delta_prefill,
    "delta.decode": lambda: delta(OPS.delta.decode, rows(ONES, 1), 4),
    "delta.replay": lambda: delta(OPS.delta.replay, rows(ONES, 1), 4, delta_ring(15, 0, 0, 7)),
    "delta.verify": lambda: delta(OPS.delta.verify, rows(DRAFTS, 8), 17, delta_ring(3, 0, 0, 12)),
    "delta.fold": delta_fold,
    "sample": sample,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name, call in CALLS.items():
        call()
        print(name, flush=True)
