"""Measure the Triton kernels on a CUDA GPU against the floor that the device sets, and against other implementations.

    python -P benchmarks/kernels.py --out benchmarks/results/kernels-h100.json
    python -P benchmarks/kernels.py --only 'decode/h64/*' --no-peers --quick

The floor of a kernel is the time in which a device-to-device copy moves the bytes that it must read and write once, or
in which a large matrix product does its arithmetic, whichever is longer. Both rates are measured here first. Decode and
small batches of experts are bound by bytes, prefill of softmax attention and large batches of experts by arithmetic.
For lightning attention the bytes are q, k, v, o once and each row's float32 state once in and once out; `replay` writes
it once in 16 steps and so goes below that floor.

Every kernel is checked against float64 on inputs of its own before it is timed; one of ours that fails is not timed,
and the exit status is 1. Times are medians over replays of a CUDA graph that calls the kernel on several sets of
inputs in turn, more than the L2 cache holds; what cannot be captured is timed by events around eager calls and says so.

Peers are measured where they can be imported: `fla-core`, and SGLang's two Triton files as the top-level modules
`lightning_attn` and `seg_la`. They get the inputs they want (contiguous, float32 for SGLang's prefill, the rows' states
side by side for fla), prepared outside the measured time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import gc
import importlib
import itertools
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from leyden.kernels import load
from leyden.models.backends import LINEAR_BACKENDS, LightningCall, LinearState
from leyden.models.forward_batch import ForwardBatch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BOUNDS = {"out": 5e-3, "state": 3e-3}  # norm(error) / norm(result) in float64, bfloat16 inputs
PEER_BOUND = 5e-2
PEERS = {"lightning_attn": "sglang minimax", "seg_la": "sglang seg_la", "fla": "fla"}  # module: its name here
DEVICE, DTYPE = "cuda", torch.bfloat16
HEAD_DIM = 128
RING = 16  # tokens that replay keeps before it writes the state; every decode case takes as many steps
CHECK_SEED, TIMED_SEED = 1_000_000, 0
MIN_SETS, MAX_SETS, BYTES_OF_SETS = 4, 128, 200e6

say = functools.partial(print, flush=True)


class Limits(NamedTuple):
    """What the device reaches: bytes copied (read and written) and bfloat16 matrix operations, per second."""

    bytes_per_s: float
    flops_per_s: float


class Work(NamedTuple):
    """What one call must do at least."""

    num_bytes: float
    flops: float = 0.0

    def floor_us(self, limits: Limits) -> float:
        return 1e6 * max(self.num_bytes / limits.bytes_per_s, self.flops / limits.flops_per_s)


class Bound(NamedTuple):
    """An implementation bound to one set of inputs."""

    step: Callable[[int], object]  # step i; what is timed
    results: Callable[[], tuple[Tensor, ...]]  # after all steps, in the order of the case's `expected`
    capturable: bool = True


class Implementation(NamedTuple):
    bind: Callable[[Any], Bound]
    is_peer: bool = False


class Case(Protocol):
    """One shape: its inputs, what they should give, and who computes it."""

    @property
    def group(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def num_steps(self) -> int: ...

    def inputs(self, seed: int, *, checked: bool) -> Any:
        """Random inputs on the GPU, outputs poisoned. Equal seeds give equal inputs."""

    def work(self, inputs: Any) -> Work:
        """Of one step."""

    def expected(self, inputs: Any) -> dict[str, Tensor]:
        """Results in float64."""

    def implementations(self) -> dict[str, Implementation]: ...


# -- lightning attention ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LightningInputs:
    """S steps of T tokens: qkv [S, T, H, 3 * 128], interleaved per head as the model's projection has it."""

    qkv: Tensor
    out: Tensor  # [S, T, H, 128]
    state: Tensor  # [num_slots, H, 128, 128] float32
    slopes: Tensor
    batch: ForwardBatch
    scale: float = 1.0  # MiniMax's

    def qkv_at(self, *index: int | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Views q, k, v at a step, or at a step's tokens."""
        q, k, v = self.qkv[index].split(HEAD_DIM, dim=-1)
        return q, k, v

    def row_states(self) -> Tensor:
        """The rows' incoming states side by side, [B, H, 128, 128]; zeros where a row is new."""
        states = self.state[self.batch.state_indices]
        states[~self.batch.has_initial_state] = 0.0
        return states


@functools.cache
def lightning_batch(lengths: tuple[int, ...], num_decodes: int, continues: tuple[bool, ...]) -> ForwardBatch:
    """Shuffled slots of a pool with three to spare.

    Every set of inputs shares the index tensors: fla keeps what it derives from them by identity.
    """
    rows = [*lengths, *[1] * num_decodes]
    slots = random.Random(0).sample(range(len(rows) + 3), len(rows))
    unused = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    return ForwardBatch(
        input_ids=unused,
        positions=unused,
        query_start_loc=torch.tensor([0, *rows], device=DEVICE).cumsum(0).int(),
        context_lens=torch.tensor(continues, device=DEVICE).int() * 4096,
        has_initial_state=torch.tensor(continues, device=DEVICE),
        state_indices=torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        num_pending=torch.zeros(len(rows), dtype=torch.int32, device=DEVICE),
        slot_mapping=unused,
        block_table=unused,
        logits_indices=unused,
        num_prefills=len(lengths),
        num_prefill_tokens=sum(lengths),
        num_decodes=num_decodes,
        prefills_pending=False,
        max_query_len=max(lengths, default=1),
    )


@dataclass(frozen=True)
class LightningCase:
    """Prefill rows of `lengths` and `num_decodes` rows of one token; all have a state when timed."""

    label: str
    heads: int
    lengths: tuple[int, ...]
    num_decodes: int = 0

    @property
    def group(self) -> str:
        return "prefill" if self.lengths else "decode"

    @property
    def name(self) -> str:
        return f"{self.group}/h{self.heads}/{self.label.replace(' ', '').replace('B=', 'b')}"

    @property
    def num_steps(self) -> int:
        return 1 if self.lengths else RING

    def inputs(self, seed: int, *, checked: bool) -> LightningInputs:
        rows, tokens = len(self.lengths) + self.num_decodes, sum(self.lengths) + self.num_decodes
        # Every second prompt of a check starts from nothing, in a slot full of NaN.
        new = [checked and row % 2 == 1 and row < len(self.lengths) for row in range(rows)]
        batch = lightning_batch(self.lengths, self.num_decodes, tuple(not is_new for is_new in new))
        qkv = normal(seed, self.num_steps, tokens, self.heads, 3 * HEAD_DIM)
        # bfloat16 values, so that a bfloat16 pool starts from the same state.
        state = normal(seed + 1, rows + 3, self.heads, HEAD_DIM, HEAD_DIM).float()
        state[batch.state_indices[~batch.has_initial_state]] = math.nan
        out = torch.full((self.num_steps, tokens, self.heads, HEAD_DIM), math.nan, dtype=qkv.dtype, device=DEVICE)
        return LightningInputs(qkv, out, state, alibi_slopes(self.heads).to(DEVICE), batch)

    def work(self, inputs: LightningInputs | None = None) -> Work:
        rows, tokens = len(self.lengths) + self.num_decodes, sum(self.lengths) + self.num_decodes
        return Work(tokens * self.heads * 4 * HEAD_DIM * 2 + 2 * rows * self.heads * HEAD_DIM**2 * 4)

    def expected(self, inputs: LightningInputs) -> dict[str, Tensor]:
        batch = inputs.batch
        q, k, v = (sequences(x) for x in inputs.qkv_at())
        rows = (batch.state_indices, batch.has_initial_state, batch.query_start_loc * self.num_steps)
        out, state = blocked_recurrence(q, k, v, inputs.slopes, inputs.scale, inputs.state, *rows)
        return {"out": out, "state": state}

    def implementations(self) -> dict[str, Implementation]:
        backends = ("minimax", "seg_la", "auto") if self.lengths else ("minimax", "seg_la")
        binds: dict[str, Callable[[LightningInputs], Bound]] = {b: functools.partial(bind_backend, b) for b in backends}
        if self.lengths:
            peers = {"lightning_attn": bind_sglang_minimax_prefill, "seg_la": bind_sglang_seg_la, "fla": bind_fla_chunk}
        else:
            binds["replay fp32"] = functools.partial(bind_replay, dtype=torch.float32)
            binds["replay bf16"] = functools.partial(bind_replay, dtype=torch.bfloat16)
            peers = {"lightning_attn": bind_sglang_minimax_decode, "seg_la": bind_sglang_seg_la, "fla": bind_fla_decode}
        ours = {name: Implementation(bind) for name, bind in binds.items()}
        return ours | {PEERS[module]: Implementation(bind, is_peer=True) for module, bind in peers.items()}


def alibi_slopes(heads: int) -> Tensor:
    return torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)])


def sequences(x: Tensor) -> Tensor:
    """[S, T, ...] to the tokens of row after row: S steps of one token each, or one step of any rows."""
    return x.transpose(0, 1).flatten(0, 1)


def blocked_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    state_indices: Tensor,
    has_initial_state: Tensor,
    query_start_loc: Tensor,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """What `leyden.kernels.lightning.reference.recurrence` returns, a block of tokens at a time, in float64."""
    slope = slopes.double()[:, None, None]
    position = torch.arange(1, block + 1, device=q.device, dtype=torch.float64)
    within = torch.exp(-slope * (position[:, None] - position).clamp(min=0)).tril()  # [H, C, C]
    out = torch.zeros(v.shape, dtype=torch.float64, device=v.device)
    finals = []
    starts, continues = query_start_loc.tolist(), has_initial_state.tolist()
    for row, slot in enumerate(state_indices.tolist()):
        s = state[slot].double() if continues[row] else torch.zeros_like(state[slot], dtype=torch.float64)
        for t in range(starts[row], starts[row + 1], block):
            m = min(block, starts[row + 1] - t)
            a = position[:m, None]
            # [H, m, K], [H, m, K], [H, m, V]
            b_q, b_k, b_v = (x[t : t + m].transpose(0, 1).double() for x in (q, k, v))
            b_o = torch.exp(-slope * a) * (b_q @ s) + (b_q @ b_k.mT * within[:, :m, :m]) @ b_v
            out[t : t + m] = scale * b_o.transpose(0, 1)
            s = torch.exp(-slope * m) * s + (b_k * torch.exp(-slope * (m - a))).mT @ b_v
        finals.append(s)
    return out, torch.stack(finals)


def in_place(x: LightningInputs, step: Callable[[int], object], state: Tensor | None = None) -> Bound:
    """A kernel that writes `x.out` and its slots of the pool."""
    pool = x.state if state is None else state
    return Bound(step, lambda: (sequences(x.out), pool[x.batch.state_indices]))


def returning(
    x: LightningInputs, step: Callable[[int], Tensor], states: Callable[[], Tensor], capturable: bool = True
) -> Bound:
    """A kernel that returns its output, in any shape that views as [T, H, 128]."""
    outs = list(x.out)

    def keep(i: int) -> None:
        outs[i] = step(i)

    return Bound(keep, lambda: (sequences(torch.stack([y.view_as(x.out[0]) for y in outs])), states()), capturable)


def bind_backend(name: str, x: LightningInputs) -> Bound:
    """A backend as the model calls it, the first time with empty rings, if it has any."""
    kernels = load("triton")
    backend = LINEAR_BACKENDS[name](kernels)
    state = LinearState(x.state, *new_rings(x, backend.ring_size))

    def step(i: int) -> None:
        backend.forward(LightningCall(*x.qkv_at(i), x.slopes, x.scale, state, x.batch, x.out[i]))

    def results() -> tuple[Tensor, Tensor]:
        decoding = slice(x.batch.num_prefills, None)
        if backend.ring_size and x.batch.num_decodes:
            rows = (x.batch.state_indices[decoding], x.batch.has_initial_state[decoding])
            kernels.lightning_fold(x.slopes, *state, *rows, torch.ones_like(rows[0]))
        return sequences(x.out), x.state[x.batch.state_indices]

    return Bound(step, results)


def new_rings(x: LightningInputs, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values, [num_slots, H, size, 128] each."""
    shape = (*x.state.shape[:2], size, HEAD_DIM)
    return x.qkv.new_full(shape, math.nan), x.qkv.new_full(shape, math.nan)


def bind_replay(x: LightningInputs, dtype: torch.dtype) -> Bound:
    """From an empty ring to the fold, so that the pool is complete after the last step."""
    kernels = load("triton")
    state, rows = x.state.to(dtype), (x.batch.state_indices, x.batch.has_initial_state)
    rings = new_rings(x, RING)
    pending = torch.arange(RING, dtype=torch.int32, device=DEVICE)[:, None].repeat(1, x.batch.num_decodes)

    def step(i: int) -> None:
        kernels.lightning_replay(*x.qkv_at(i), x.slopes, x.scale, state, *rings, *rows, pending[i], x.out[i])

    return in_place(x, step, state)


def bind_sglang_minimax_prefill(x: LightningInputs) -> Bound:
    """As SGLang's backend has it: a call per prompt, then the decode kernel for the rows of one token."""
    module, batch = importlib.import_module("lightning_attn"), x.batch
    starts, slots = batch.query_start_loc.tolist(), batch.state_indices.tolist()
    continues, tokens = batch.has_initial_state.tolist(), batch.num_prefill_tokens
    rows = [
        [y[0, starts[b] : starts[b + 1]].transpose(0, 1)[None].float().contiguous() for y in x.qkv_at()]
        for b in range(batch.num_prefills)
    ]
    decode = [y[0, tokens:, :, None].contiguous() for y in x.qkv_at()]
    decode_slots = batch.state_indices[batch.num_prefills :].clone()
    prompts: list[Tensor] = [torch.empty(0)] * len(rows)

    def step(_: int) -> None:
        for b, qkv in enumerate(rows):
            history = x.state[slots[b]][None] if continues[b] else None
            prompts[b], states = module.lightning_attention(*qkv, x.slopes, kv_history=history)
            x.state[slots[b]].copy_(states[0, :, -1])
        if batch.num_decodes:
            out = module.linear_decode_forward_triton(*decode, x.state, x.slopes, decode_slots)
            x.out[0, tokens:] = out.view_as(x.out[0, tokens:])

    def results() -> tuple[Tensor, Tensor]:
        out = torch.cat([*[prompt[0].transpose(0, 1) for prompt in prompts], x.out[0, tokens:].float()])
        return out, x.state[batch.state_indices]

    return Bound(step, results)


def bind_sglang_minimax_decode(x: LightningInputs) -> Bound:
    module = importlib.import_module("lightning_attn")
    q, k, v = (y[:, :, :, None].contiguous() for y in x.qkv_at())

    def step(i: int) -> Tensor:
        return module.linear_decode_forward_triton(q[i], k[i], v[i], x.state, x.slopes, x.batch.state_indices)

    return returning(x, step, lambda: x.state[x.batch.state_indices])


def bind_sglang_seg_la(x: LightningInputs) -> Bound:
    module, batch = importlib.import_module("seg_la"), x.batch
    q, k, v = (y.contiguous() for y in x.qkv_at())
    meta = module.SegLaMeta(
        batch_size=len(batch.state_indices),
        max_q_length=batch.max_query_len,
        q_offsets=batch.query_start_loc,
        s_offsets=batch.state_indices,
        q_lengths=batch.query_start_loc.diff(),
        s_scales=batch.has_initial_state,
    )

    def step(i: int) -> Tensor:
        return module.seg_la_fwd(q[i], k[i], v[i], x.state, x.slopes, meta, softmax_scale=x.scale)

    return returning(x, step, lambda: x.state[batch.state_indices])


def bind_fla_chunk(x: LightningInputs) -> Bound:
    module, batch = importlib.import_module("fla.ops.simple_gla"), x.batch
    q, k, v = (y.contiguous() for y in x.qkv_at())  # [1, T, H, 128], the layout of packed rows
    states, log_decay = x.row_states(), -x.slopes
    starts = batch.query_start_loc if len(batch.state_indices) > 1 else None
    finals = [states]

    def step(i: int) -> Tensor:
        out, finals[0] = module.chunk_simple_gla(
            q, k, v, g_gamma=log_decay, scale=x.scale, initial_state=states, output_final_state=True, cu_seqlens=starts
        )
        return out

    # With several rows fla reads the number of chunks on the host, which a capture forbids.
    return returning(x, step, lambda: finals[0], capturable=starts is None)


def bind_fla_decode(x: LightningInputs) -> Bound:
    """A step starts from the states that the step before returned, the first from the rows' own."""
    module = importlib.import_module("fla.ops.simple_gla")
    q, k, v = (y[:, :, None].contiguous() for y in x.qkv_at())  # [S, B, 1, H, 128]
    initial, log_decay = x.row_states(), -x.slopes
    last = [initial]

    def step(i: int) -> Tensor:
        states = last[0] if i else initial
        out, last[0] = module.fused_recurrent_simple_gla(
            q[i], k[i], v[i], g_gamma=log_decay, scale=x.scale, initial_state=states, output_final_state=True
        )
        return out

    return returning(x, step, lambda: last[0])


# -- softmax attention -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionInputs:
    q: Tensor  # [T, H, D]
    caches: tuple[Tensor, Tensor]  # keys, values [num_blocks, 16, H_kv, D]
    block_table: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    out: Tensor

    def history(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one row, [L, H_kv, D]."""
        keys, values = (cache[self.block_table[row]].flatten(0, 1) for cache in self.caches)
        return keys, values


@dataclass(frozen=True)
class AttentionCase:
    """Rows of `length` positions, of which each queries the last one (decode) or all (prefill)."""

    is_prefill: bool
    num_rows: int
    length: int
    head_dim: int
    heads: int = 32
    kv_heads: int = 8
    block_size: int = 16
    num_steps: int = 1

    @property
    def group(self) -> str:
        return "attention-prefill" if self.is_prefill else "attention-decode"

    @property
    def label(self) -> str:
        return f"{self.num_rows} x {self.length}, D={self.head_dim}"

    @property
    def name(self) -> str:
        return f"{self.group}/d{self.head_dim}/{self.num_rows}x{self.length}"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def checked_heads(self) -> list[int]:
        """A prefill's float64 scores are n x n per head."""
        return [0, self.heads // 2 + 1, self.heads - 1] if self.is_prefill else list(range(self.heads))

    def inputs(self, seed: int, *, checked: bool) -> AttentionInputs:
        blocks = self.length // self.block_size
        queries = self.length if self.is_prefill else 1
        cache = (self.num_rows * blocks, self.block_size, self.kv_heads, self.head_dim)
        order = torch.randperm(cache[0], generator=generator(seed), device=DEVICE)
        q = normal(seed, self.num_rows * queries, self.heads, self.head_dim)
        return AttentionInputs(
            q,
            (normal(seed + 1, *cache), normal(seed + 2, *cache)),
            order.view(self.num_rows, blocks).int(),
            torch.arange(self.num_rows + 1, device=DEVICE, dtype=torch.int32) * queries,
            torch.full((self.num_rows,), self.length - queries, dtype=torch.int32, device=DEVICE),
            torch.full_like(q, math.nan),
        )

    def work(self, inputs: AttentionInputs | None = None) -> Work:
        key_bytes = self.num_rows * self.length * self.kv_heads * self.head_dim * 2
        if not self.is_prefill:
            return Work(2 * key_bytes)
        query_bytes = key_bytes * self.heads // self.kv_heads
        pairs = self.num_rows * self.length * (self.length + 1) // 2
        return Work(2 * key_bytes + 2 * query_bytes, 4 * pairs * self.heads * self.head_dim)

    def expected(self, inputs: AttentionInputs) -> dict[str, Tensor]:
        rows = []
        for row, q in enumerate(inputs.q.view(self.num_rows, -1, self.heads, self.head_dim)):
            keys, values = inputs.history(row)
            group = self.heads // self.kv_heads
            heads = [self._one_head(q[:, h], keys[:, h // group], values[:, h // group]) for h in self.checked_heads]
            rows.append(torch.stack(heads, dim=1))
        return {"out": torch.cat(rows)}

    def _one_head(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        score = q.double() @ keys.double().mT * self.scale
        if self.is_prefill:
            score.masked_fill_(torch.ones_like(score, dtype=torch.bool).triu_(1), -math.inf)
        return score.softmax(dim=-1) @ values.double()

    def implementations(self) -> dict[str, Implementation]:
        if not self.is_prefill:
            return {"leyden": Implementation(self.bind_decode)}
        flash = functools.partial(self.bind_sdpa, SDPBackend.FLASH_ATTENTION)
        cudnn = functools.partial(self.bind_sdpa, SDPBackend.CUDNN_ATTENTION)
        return {
            "leyden": Implementation(self.bind_prefill),
            "torch flash": Implementation(flash, is_peer=True),
            "torch cudnn": Implementation(cudnn, is_peer=True),
        }

    def bind_decode(self, x: AttentionInputs) -> Bound:
        kernels = load("triton")

        def step(_: int) -> None:
            kernels.attention_decode(x.q, *x.caches, x.block_table, x.context_lens, self.scale, x.out)

        return Bound(step, lambda: (x.out,))

    def bind_prefill(self, x: AttentionInputs) -> Bound:
        kernels = load("triton")

        def step(_: int) -> None:
            rows = (x.block_table, x.query_start_loc, x.context_lens, self.length)
            kernels.attention_prefill(x.q, *x.caches, *rows, self.scale, x.out)

        return Bound(step, lambda: (x.out[:, self.checked_heads],))

    def bind_sdpa(self, backend: SDPBackend, x: AttentionInputs) -> Bound:
        """On contiguous keys and values, [rows, H_kv, L, D] in the layout that flash attention likes."""
        shape = (self.num_rows, self.length, self.kv_heads, self.head_dim)
        k, v = (cache[x.block_table].view(shape).transpose(1, 2) for cache in x.caches)
        q = x.q.view(self.num_rows, self.length, self.heads, self.head_dim).transpose(1, 2)
        kept: list[Tensor] = []

        def step(_: int) -> None:
            with sdpa_kernel(backend):
                kept[:] = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)]

        return Bound(step, lambda: (kept[0].transpose(1, 2).flatten(0, 1)[:, self.checked_heads],))


# -- experts ---------------------------------------------------------------------------------------------------


class MoeInputs(NamedTuple):
    """In the order of `Kernels.moe`."""

    x: Tensor  # [T, d]
    gate_up: Tensor  # [E, 2F, d]
    down: Tensor  # [E, d, F]
    weights: Tensor  # [T, k]
    experts: Tensor


@functools.lru_cache(maxsize=1)
def expert_weights(num_experts: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2F, d] and down [E, d, F]; more than an L2 cache holds, so all inputs share them."""
    gate_up = normal(1, num_experts, 2 * width, size).mul_(size**-0.5)
    return gate_up, normal(2, num_experts, size, width).mul_(width**-0.5)


@dataclass(frozen=True)
class MoeCase:
    tokens: int
    num_experts: int = 64
    top_k: int = 4
    size: int = 2048
    width: int = 1408
    group: str = "moe"
    num_steps: int = 1

    @property
    def label(self) -> str:
        return f"T={self.tokens}"

    @property
    def name(self) -> str:
        return f"moe/t{self.tokens}"

    def inputs(self, seed: int, *, checked: bool) -> MoeInputs:
        chances = torch.rand(self.tokens, self.num_experts, generator=generator(seed + 1), device=DEVICE)
        weights, experts = chances.topk(self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        x = normal(seed, self.tokens, self.size)
        return MoeInputs(x, *expert_weights(self.num_experts, self.width, self.size), weights, experts)

    def work(self, inputs: MoeInputs) -> Work:
        return self.work_for(num_hit=len(inputs.experts.unique()))

    def work_for(self, num_hit: int) -> Work:
        """Each expert that a token chose is read once; x and y are small beside them, but counted."""
        matrices = 3 * self.size * self.width
        num_bytes = 2 * (num_hit * matrices + 2 * self.tokens * self.size)
        return Work(num_bytes, 2 * self.tokens * self.top_k * matrices)

    def expected(self, inputs: MoeInputs) -> dict[str, Tensor]:
        y = torch.zeros_like(inputs.x, dtype=torch.float64)
        for e in range(self.num_experts):
            token, choice = (inputs.experts == e).nonzero(as_tuple=True)
            gate, up = (inputs.x[token].double() @ inputs.gate_up[e].double().mT).chunk(2, dim=-1)
            rows = F.silu(gate) * up @ inputs.down[e].double().mT
            y.index_add_(0, token, rows * inputs.weights[token, choice, None].double())
        return {"out": y}

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, inputs: MoeInputs) -> Bound:
        kernels = load("triton")
        kept: list[Tensor] = []

        def step(_: int) -> None:
            kept[:] = [kernels.moe(*inputs)]

        return Bound(step, lambda: (kept[0],))


# -- the cases -------------------------------------------------------------------------------------------------


def ragged_lengths() -> tuple[int, ...]:
    """16 lengths that add up to nearly 16 x 1024."""
    choose = random.Random(96)
    return tuple(choose.randint(512, 1536) for _ in range(16))


def all_cases() -> Iterator[Case]:
    for heads in (64, 16):
        yield LightningCase("1 x 2048", heads, (2048,))
        yield LightningCase("1 x 8192", heads, (8192,))
        yield LightningCase("16 ragged", heads, ragged_lengths())
        yield LightningCase("4 x 2048 + 60", heads, (2048,) * 4, 60)
        yield LightningCase("64 x 128", heads, (128,) * 64)
    for heads, label, prompts in (  # where `auto` changes its mind
        (32, "1 x 8192", (8192,)),
        (16, "2 x 4096", (4096,) * 2),
        (16, "3 x 4096", (4096,) * 3),
        (16, "2 x 512", (512,) * 2),
        (16, "8 x 512", (512,) * 8),
        (8, "1 x 1024", (1024,)),
        (8, "4 x 2048", (2048,) * 4),
    ):
        yield LightningCase(label, heads, prompts)
    for heads in (64, 16):
        for rows in (1, 8, 32, 64, 128, 256):
            yield LightningCase(f"B={rows}", heads, (), rows)
    for head_dim in (128, 64):
        yield AttentionCase(is_prefill=False, num_rows=64, length=4096, head_dim=head_dim)
    for rows, length in ((1, 4096), (1, 8192), (4, 2048)):
        yield AttentionCase(is_prefill=True, num_rows=rows, length=length, head_dim=128)
    for tokens in (1, 8, 32, 64, 128, 256, 8192):
        yield MoeCase(tokens)


# -- checking and timing ---------------------------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE, generator=generator(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """norm(actual - expected) / norm(expected); NaN where anything is."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(case: Case, implementation: Implementation, expected: dict[str, Tensor]) -> dict[str, float]:
    bound = implementation.bind(case.inputs(CHECK_SEED, checked=True))
    for i in range(case.num_steps):
        bound.step(i)
    return {name: relative_error(x, expected[name]) for name, x in zip(expected, bound.results(), strict=True)}


def excess(errors: dict[str, float], *, is_peer: bool) -> str | None:
    """Which error is above its bound, NaN included; None when none is."""
    for name, error in errors.items():
        bound = PEER_BOUND if is_peer else BOUNDS[name]
        if not error <= bound:
            return f"{name} error {error:.1e} is above {bound:.0e}"
    return None


def time_us(bounds: Sequence[Bound], num_steps: int, seconds: float) -> tuple[float, str]:
    """Median microseconds per step, and how they were taken. Every step goes through all inputs before the next."""

    def everything() -> None:
        for i in range(num_steps):
            for bound in bounds:
                bound.step(i)

    everything()  # compiles, tunes
    torch.cuda.synchronize()
    replay = captured(everything) if all(bound.capturable for bound in bounds) else None
    us = 1e6 * median_seconds(replay or everything, seconds) / (num_steps * len(bounds))
    return us, "graph" if replay else "events"


def captured(function: Callable[[], object]) -> Callable[[], None] | None:
    """`function` as a CUDA graph, or None where something in it cannot be captured."""
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except Exception as error:
        torch.cuda.set_stream(stream)  # a capture that fails may leave its own stream current
        torch.cuda.synchronize()
        say(f"    not captured: {first_line(error)}")
        return None
    return graph.replay


def median_seconds(function: Callable[[], object], budget: float, most: int = 200) -> float:
    """Of about `budget` seconds of calls, enqueued back to back so that the device never waits between two."""
    once = statistics.median(elapsed_seconds(function, 3))
    return statistics.median(elapsed_seconds(function, max(5, min(most, int(budget / max(once, 1e-6))))))


def elapsed_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 2)]
    for mark in marks[:-1]:
        mark.record()
        function()
    marks[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks[1:])]


def measure_limits(seconds: float) -> Limits:
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE).zero_()
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), seconds)
    num_bytes, n = 2 * source.numel(), 8192
    a, b = normal(0, n, n), normal(1, n, n)
    return Limits(num_bytes / copy, 2 * n**3 / median_seconds(lambda: a @ b, seconds))


def measure(case: Case, limits: Limits, seconds: float, peers: bool) -> dict[str, Any]:
    """The case's entry of the report; prints as it goes."""
    expected = case.expected(case.inputs(CHECK_SEED, checked=True))
    first = case.inputs(TIMED_SEED, checked=False)
    num_sets = sets_for(case.work(first).num_bytes)
    sets = [first, *[case.inputs(TIMED_SEED + 10 * i, checked=False) for i in range(1, num_sets)]]
    floor = statistics.mean(case.work(inputs).floor_us(limits) for inputs in sets)
    entry = {"case": case.name, "group": case.group, "label": case.label, "floor_us": rounded(floor)}
    if isinstance(case, LightningCase):
        entry["heads"] = case.heads
    say(f"\n{case.name}  floor {floor:.1f} us, {num_sets} sets of inputs")
    results = {}
    for name, implementation in case.implementations().items():
        if implementation.is_peer and not (peers and is_available(name)):
            continue
        results[name] = measure_one(case, implementation, expected, sets, floor, seconds)
        print_result(name, results[name])
        release_memory()
    add_ratios(results)
    return entry | {"results": results}


def sets_for(num_bytes: float) -> int:
    return min(MAX_SETS, max(MIN_SETS, math.ceil(BYTES_OF_SETS / num_bytes)))


def measure_one(
    case: Case,
    implementation: Implementation,
    expected: dict[str, Tensor],
    sets: Sequence[Any],
    floor: float,
    seconds: float,
) -> dict[str, Any]:
    """What broke is reported, and the run goes on; only what is correct, or a peer's, is timed."""
    result: dict[str, Any] = {"peer": implementation.is_peer}
    try:
        errors = check(case, implementation, expected)
        result["errors"] = {name: rounded(error) for name, error in errors.items()}
        wrong = excess(errors, is_peer=implementation.is_peer)
        if wrong:
            result["inaccurate" if implementation.is_peer else "failure"] = wrong
        if "failure" not in result:
            us, timed_by = time_us([implementation.bind(inputs) for inputs in sets], case.num_steps, seconds)
            result |= {"us": rounded(us), "times_floor": rounded(us / floor), "timed_by": timed_by}
    except Exception as error:
        result["failure"] = first_line(error)
    return result


def rounded(value: float, digits: int = 4) -> float | None:
    """To significant digits; JSON has no NaN."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def release_memory() -> None:
    """A graph's memory returns to the device only so."""
    gc.collect()
    torch.cuda.empty_cache()


# -- peers and the report --------------------------------------------------------------------------------------


@functools.cache
def peer_module(name: str) -> ModuleType | str:
    """The module, or why it cannot be had."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return first_line(error)


def is_available(implementation: str) -> bool:
    """Torch's own are always there."""
    modules = [module for module, name in PEERS.items() if name == implementation]
    return all(isinstance(peer_module(module), ModuleType) for module in modules)


def software(peers: bool) -> dict[str, str | None]:
    """Versions of what is measured; SGLang's files have none."""
    found: dict[str, str | None] = {"torch": torch.__version__, "triton": importlib.import_module("triton").__version__}
    for name in PEERS if peers else ():
        module = peer_module(name)
        if isinstance(module, ModuleType):
            found[name] = getattr(module, "__version__", None)
        else:
            print(f"without {name}: {module}", file=sys.stderr)
    return found


def print_result(name: str, result: dict[str, Any]) -> None:
    errors = "  ".join(f"{key} {value}" for key, value in result.get("errors", {}).items())
    if "us" in result:
        share = f"{result['us']:>9.1f} us {result['times_floor']:>7.2f}x floor {100 / result['times_floor']:>5.0f} %"
        say(f"  {name:<16}{share}  {result['timed_by']:<6}  error: {errors}  {result.get('inaccurate', '')}")
    else:
        say(f"  {name:<16} FAILED {result['failure']}  {errors}")


def add_ratios(results: dict[str, dict[str, Any]]) -> None:
    """How long each takes beside torch's flash attention, where that was measured."""
    flash = results.get("torch flash", {}).get("us")
    for name, result in results.items():
        if flash and "us" in result and name != "torch flash":
            result["times_flash"] = rounded(result["us"] / flash)
            say(f"  {name}: {result['times_flash']:.2f}x torch flash")


def own_failures(entries: list[dict[str, Any]]) -> list[str]:
    return [
        f"{entry['case']} {name}: {result['failure']}"
        for entry in entries
        for name, result in entry["results"].items()
        if "failure" in result and not result["peer"]
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help="cases by name: 'decode/h64/*'")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="measure ours alone")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--out", type=Path, default=None, help="write the JSON here too")
    return parser.parse_args(arguments)


def chosen_cases(globs: Sequence[str]) -> list[Case]:
    chosen = [case for case in all_cases() if any(fnmatch.fnmatch(case.name, glob) for glob in globs)]
    if not chosen:
        raise SystemExit(f"no case matches {' '.join(globs)}; there are {', '.join(c.name for c in all_cases())}")
    return chosen


def main() -> int:
    arguments = parse_arguments()
    cases = chosen_cases(arguments.only)
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA GPU and found none.", file=sys.stderr)
        return 2
    with torch.inference_mode():
        report = measure_all(cases, 0.05 if arguments.quick else 0.25, arguments.peers, arguments.out)
    for failure in report["failures"]:
        print(f"FAILED {failure}", file=sys.stderr)
    say(json.dumps(report))
    return 1 if report["failures"] else 0


def measure_all(cases: Sequence[Case], seconds: float, peers: bool, path: Path | None) -> dict[str, Any]:
    """The report, written to `path` after every case, so that a run cut short keeps what it measured."""
    limits = measure_limits(seconds)
    release_memory()
    report: dict[str, Any] = {
        "hardware": f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores",
        "software": software(peers),
        "copy_tb_per_s": rounded(limits.bytes_per_s / 1e12),
        "matrix_tflop_per_s": rounded(limits.flops_per_s / 1e12),
        "failures": [],
        "cases": [],
    }
    say("{hardware}: copies {copy_tb_per_s} TB/s, multiplies {matrix_tflop_per_s} Tflop/s".format(**report))
    for case in cases:
        try:
            entry = measure(case, limits, seconds, peers)
            report["cases"].append(entry)
            report["failures"] += own_failures([entry])
            release_memory()
        except Exception as error:  # no memory, or a kernel took the device down: what is measured is still reported
            report["failures"].append(f"{case.name}: {first_line(error)}")
        if path:
            path.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    sys.exit(main())
