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
from leyden.kernels import triton_ops as ops
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0
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


def moe(num_tokens: int, num_experts: int) -> None:
    size, width = 21, 19  # no tile divides them
    weights = normal(num_experts, 2 * width, size), normal(num_experts, size, width)
    ops.moe(normal(num_tokens, size), *weights, normal(num_tokens, 2), experts(num_tokens, num_experts, 2))


HEADS, K = 3, 20
SLOPES = (0.5, 0.004, 4.0)
ROWS = {"slots": (2, 0, -1, 1), "new": (True, False, True, True), "starts": (0, 40, 41, 50, 52)}


def lightning(name: str, *more: Tensor | int, num_tokens: int, ring: int | None = None) -> None:
    q, k, v, out = (normal(num_tokens, HEADS, K) for _ in range(4))
    state = [normal(3, HEADS, K, K)]
    if ring is not None:
        state += [normal(3, HEADS, ring, K), normal(3, HEADS, ring, K)]
    slopes = guarded(torch.tensor(SLOPES))
    getattr(ops, name)(q, k, v, slopes, 0.3, *state, ints(*ROWS["slots"]), flags(*ROWS["new"]), *more, out)


def fold() -> None:
    rings = normal(3, HEADS, 16, K), normal(3, HEADS, 16, K)
    slots = ints(2, 0, 1)
    ops.lightning_fold(
        guarded(torch.tensor(SLOPES)), normal(3, HEADS, K, K), *rings, slots, flags(True, False, True), ints(16, 0, 5)
    )


def snapshot() -> None:
    rows = ints(*ROWS["slots"]), flags(*ROWS["new"]), ints(*ROWS["starts"])
    wanted = guarded(torch.tensor([[0, 33, 1], [3, 2, 0], [0, 1, -1]]).int())
    slopes = guarded(torch.tensor(SLOPES))
    ops.lightning_snapshot(
        normal(52, HEADS, K),
        normal(52, HEADS, K),
        slopes,
        normal(3, HEADS, K, K),
        *rows,
        wanted,
        normal(2, HEADS, K, K),
    )


def attention(*, is_prefill: bool) -> None:
    caches = normal(6, 16, 2, K), normal(6, 16, 2, K)
    table, rows, context = guarded(torch.tensor([[5, 0], [1, 3], [4, 2]]).int()), ints(2, 0, -1, 1), ints(30, 0, -1, 6)
    if is_prefill:
        q, out = normal(42, 6, K), normal(42, 6, K)
        ops.attention_prefill(q, *caches, table, rows, ints(0, 2, 31, 41, 42), context, 29, 0.3, out)
    else:
        q, out = normal(4, 6, K), normal(4, 6, K)
        ops.attention_decode(q, *caches, table, rows, context, 0.3, out)


def rope() -> None:
    caches = normal(6, 5, 2, K), normal(6, 5, 2, K)
    q, key, value = normal(4, 6, K), normal(4, 2, K), normal(4, 2, K)
    places = ints(7, 0, 2, 1, dtype=torch.int64), normal(8, 10), *caches, ints(29, -1, 0, 11, dtype=torch.int64)
    ops.rope_and_store_kv(q, key, value, *places)


def sample() -> None:
    num, vocab = 3, 1037
    options = guarded(torch.tensor([0.0, 1.0, 0.7])), ints(0, 5, 0), guarded(torch.tensor([1.0, 0.9, 0.5]))
    ops.sample(normal(num, vocab), *options, guarded(torch.tensor([0.0, 0.01, 0.0])), guarded(torch.rand(num)))


CALLS: dict[str, Callable[[], object]] = {
    "linear of one": lambda: ops.linear(normal(1, 20), normal(19, 20)),
    "linear of many": lambda: ops.linear(normal(33, 20), normal(19, 20)),
    "moe of few": lambda: moe(1, 5),
    "moe of many": lambda: moe(9, 5),
    "route": lambda: ops.route(normal(5, 7), 2),
    "rms_norm": lambda: ops.rms_norm(normal(5, 37), normal(37), 1e-5),
    "add_rms_norm": lambda: ops.add_rms_norm(normal(5, 37), normal(5, 37), normal(37), 1e-5, 0.5, 2.0),
    "gated_rms_norm": lambda: ops.gated_rms_norm(normal(5, 38), normal(5, 38), normal(38), 1e-5, 2),
    "silu_": lambda: ops.silu_(normal(5, 37)),
    "silu_and_mul": lambda: ops.silu_and_mul(normal(5, 74)),
    "rope_and_store_kv": rope,
    "attention_prefill": lambda: attention(is_prefill=True),
    "attention_decode": lambda: attention(is_prefill=False),
    "lightning_prefill": lambda: lightning("lightning_prefill", ints(*ROWS["starts"]), 40, num_tokens=52),
    "lightning_segments": lambda: lightning("lightning_segments", ints(*ROWS["starts"]), 40, num_tokens=52),
    "lightning_decode": lambda: lightning("lightning_decode", num_tokens=4),
    "lightning_replay": lambda: lightning("lightning_replay", ints(15, 0, 0, 7), num_tokens=4, ring=16),
    "lightning_verify": lambda: lightning(
        "lightning_verify", ints(3, 0, 0, 12), ints(0, 8, 9, 13, 17), num_tokens=17, ring=16
    ),
    "lightning_fold": fold,
    "lightning_snapshot": snapshot,
    "sample": sample,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name, call in CALLS.items():
        call()
        print(name, flush=True)
