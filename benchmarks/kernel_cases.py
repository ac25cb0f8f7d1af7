"""The cases of `benchmarks/kernels.py`: inputs, the least that a call must do, results in float64, and our kernels."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from leyden.kernels import Kernels, load
from leyden.models.backends import LINEAR_BACKENDS, LightningCall, LinearState
from leyden.models.forward_batch import ForwardBatch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE, DTYPE = "cuda", torch.bfloat16
HEAD_DIM = 128
RING = 16  # tokens that replay keeps before it writes the state; every decode case takes as many steps


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE, generator=generator(seed))


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


def in_one_step(call: Callable[[], tuple[Tensor, ...]]) -> Bound:
    """A kernel that returns its results, in the order of the case's `expected`."""
    kept: list[Tensor] = []

    def step(_: int) -> None:
        kept[:] = call()

    return Bound(step, lambda: tuple(kept))


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
        max_query_len=max(lengths, default=1),
    )


@dataclass(frozen=True)
class LightningCase:
    """Prefill rows of `lengths` and `num_decodes` rows of one token; all have a state when timed."""

    label: str
    heads: int
    lengths: tuple[int, ...]
    num_decodes: int = 0
    has_peers: bool = True

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
        if not self.lengths:
            binds["replay fp32"] = functools.partial(bind_replay, dtype=torch.float32)
            binds["replay bf16"] = functools.partial(bind_replay, dtype=torch.bfloat16)
        return {name: Implementation(bind) for name, bind in binds.items()}


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


class VerifyInputs(NamedTuple):
    """`lightning` as one step, and rings [num_slots, H, 16, 128] of keys and of values with the waiting tokens."""

    lightning: LightningInputs
    rings: tuple[Tensor, Tensor]
    pending: Tensor

    def row_rings(self) -> tuple[Tensor, Tensor]:
        keys, values = (ring[self.lightning.batch.state_indices] for ring in self.rings)
        return keys, values


@dataclass(frozen=True)
class VerifyCase:
    """Rows of a few tokens, most of them drafts, whose rings are then full: half was waiting, half is new."""

    heads: int
    num_rows: int
    group: str = "verify"
    num_steps: int = 1
    WAITING = NEW = RING // 2

    @property
    def label(self) -> str:
        return f"B={self.num_rows}"

    @property
    def name(self) -> str:
        return f"verify/h{self.heads}/b{self.num_rows}"

    def inputs(self, seed: int, *, checked: bool) -> VerifyInputs:
        lightning = LightningCase(self.label, self.heads, (self.NEW,) * self.num_rows).inputs(seed, checked=False)
        rings = new_rings(lightning, RING)
        for i, ring in enumerate(rings):
            ring[:, :, : self.WAITING] = normal(seed + 2 + i, *ring[:, :, : self.WAITING].shape)
        return VerifyInputs(lightning, rings, torch.full_like(lightning.batch.state_indices, self.WAITING))

    def work(self, inputs: VerifyInputs | None = None) -> Work:
        states = self.num_rows * self.heads * HEAD_DIM**2 * 4
        waiting, new = (self.num_rows * self.heads * n * HEAD_DIM * 2 for n in (self.WAITING, self.NEW))
        return Work(states + 2 * waiting + (4 + 2) * new)  # keys and values that wait; q, k, v, o; k and v for the ring

    def expected(self, inputs: VerifyInputs) -> dict[str, Tensor]:
        x, length = inputs.lightning, self.WAITING + self.NEW
        q, k, v = (y.unflatten(0, (self.num_rows, self.NEW)) for y in x.qkv_at(0))
        rings = [ring[:, :, : self.WAITING].transpose(1, 2) for ring in inputs.row_rings()]  # [B, p, H, 128]
        keys, values = (torch.cat([waiting, new], dim=1) for waiting, new in zip(rings, (k, v), strict=True))
        queries = torch.cat([torch.zeros_like(rings[0]), q], dim=1)
        starts = torch.arange(self.num_rows + 1) * length
        rows = (x.state, x.batch.state_indices, x.batch.has_initial_state, starts)
        out, _ = blocked_recurrence(*(y.flatten(0, 1) for y in (queries, keys, values)), x.slopes, x.scale, *rows)
        ring = torch.cat([keys, values], dim=-1).transpose(1, 2).double()
        return {"out": out.unflatten(0, (self.num_rows, length))[:, self.WAITING :].flatten(0, 1), "ring": ring}

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, inputs: VerifyInputs) -> Bound:
        kernels, x = load("triton"), inputs.lightning
        rows = (x.batch.state_indices, x.batch.has_initial_state, inputs.pending, x.batch.query_start_loc)

        def step(_: int) -> None:
            kernels.lightning_verify(*x.qkv_at(0), x.slopes, x.scale, x.state, *inputs.rings, *rows, x.out[0])

        return Bound(step, lambda: (x.out[0], torch.cat(inputs.row_rings(), dim=-1)))


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
        return in_one_step(lambda: (kernels.moe(*inputs),))


# -- one row times a matrix ------------------------------------------------------------------------------------


class LinearInputs(NamedTuple):
    """In the order of `Kernels.linear`."""

    x: Tensor  # [1, K]
    weight: Tensor  # [N, K], another in every set of inputs


@dataclass(frozen=True)
class LinearCase:
    """x [1, size] @ weight [channels, size]^T."""

    channels: int
    size: int
    group: str = "linear"
    num_steps: int = 1

    @property
    def label(self) -> str:
        return f"{self.channels} x {self.size}"

    @property
    def name(self) -> str:
        return f"linear/{self.channels}x{self.size}"

    def inputs(self, seed: int, *, checked: bool) -> LinearInputs:
        weight = normal(seed + 1, self.channels, self.size).mul_(self.size**-0.5)
        return LinearInputs(normal(seed, 1, self.size), weight)

    def work(self, inputs: LinearInputs | None = None) -> Work:
        """x and y are nothing beside the weight."""
        return Work(2 * self.channels * self.size)

    def expected(self, inputs: LinearInputs) -> dict[str, Tensor]:
        return {"out": inputs.x.double() @ inputs.weight.double().mT}

    def implementations(self) -> dict[str, Implementation]:
        torch_linear = Implementation(lambda inputs: in_one_step(lambda: (F.linear(*inputs),)), is_peer=True)
        return {"leyden": Implementation(self.bind), "torch": torch_linear}

    def bind(self, inputs: LinearInputs) -> Bound:
        kernels = load("triton")
        return in_one_step(lambda: (kernels.linear(*inputs),))


# -- sampling --------------------------------------------------------------------------------------------------


class SamplingInputs(NamedTuple):
    """In the order of `Kernels.sample`."""

    logits: Tensor  # [B, V]
    temperature: Tensor  # [B] float32, as are the rest but for top_k, which is int32
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


SAMPLERS = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (1.0, 0, 1.0, 0.0),
    "min_p 0.05": (1.0, 0, 1.0, 0.05),
    "top_k 50": (1.0, 50, 1.0, 0.0),
    "top_p 0.9": (1.0, 0, 0.9, 0.0),
}


@dataclass(frozen=True)
class SamplingCase:
    """A token for each of `rows` rows of logits, all drawn alike."""

    sampler: str  # of SAMPLERS
    rows: int = 256
    vocab: int = 200_064
    group: str = "sampling"
    num_steps: int = 1

    @property
    def label(self) -> str:
        return f"{self.sampler}, B={self.rows}, V={self.vocab:,}"

    @property
    def name(self) -> str:
        return f"sampling/{self.sampler.replace(' ', '')}"

    def inputs(self, seed: int, *, checked: bool) -> SamplingInputs:
        temperature, top_k, top_p, min_p = (
            torch.full((self.rows,), value, device=DEVICE) for value in SAMPLERS[self.sampler]
        )
        uniform = torch.rand(self.rows, generator=generator(seed + 1), device=DEVICE)
        logits = normal(seed, self.rows, self.vocab).mul_(3)
        return SamplingInputs(logits, temperature.float(), top_k.int(), top_p.float(), min_p.float(), uniform)

    def work(self, inputs: SamplingInputs | None = None) -> Work:
        """Every logit is read once."""
        return Work(2 * self.rows * self.vocab)

    def expected(self, inputs: SamplingInputs) -> dict[str, Tensor]:
        return {"out": torch.ones(self.rows, dtype=torch.float64, device=inputs.logits.device)}

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, inputs: SamplingInputs) -> Bound:
        kernels = load("triton")
        kept: list[Tensor] = []

        def step(_: int) -> None:
            kept[:] = [kernels.sample(*inputs)]

        return Bound(step, lambda: (1 + torch.stack([self._miss(inputs, kept[0], i) for i in range(self.rows)]),))

    def _miss(self, inputs: SamplingInputs, tokens: Tensor, row: int) -> Tensor:
        """By how much probability the uniform number lies outside of the token's share, in float64; greedy: whether
        another logit is larger."""
        x, token = inputs.logits[row].double(), tokens[row].long()
        temperature, top_k, top_p, min_p = SAMPLERS[self.sampler]
        if temperature == 0:
            return (x[token] < x.max()).double()
        p = torch.softmax(x / temperature, dim=0)
        ordered = p.sort(descending=True).values
        last = top_k - 1 if top_k else int((ordered.cumsum(0) < top_p).sum().clamp(max=len(p) - 1))
        kept = torch.where((p >= ordered[last]) & (p >= min_p * ordered[0]), p, 0.0)
        share = kept.cumsum(0) / kept.sum()
        before, after = share[token] - kept[token] / kept.sum(), share[token]
        return torch.relu(before - inputs.uniform[row]) + torch.relu(inputs.uniform[row] - after)


# -- around attention ------------------------------------------------------------------------------------------

SILU_WIDTH = 12288  # of silu_'s 16,384 channels: q, k and v in a projection that has the gate beside them
EPS, ALPHA, BETA = 1e-5, 3.5, 1.0


class Operation(NamedTuple):
    """What is done to tensors [T, width] between the large products."""

    widths: tuple[int, ...]  # of the inputs
    num_moved: int  # elements read and written per token
    call: Callable[..., tuple[Tensor, ...]]  # of Kernels, the inputs and the norm's weight if there is one
    expected: Callable[..., dict[str, Tensor]]  # of the same in float64, without Kernels
    has_weight: bool = False


def call_silu_(kernels: Kernels, x: Tensor) -> tuple[Tensor]:
    kernels.silu_(x[:, :SILU_WIDTH])
    return (x,)


def expected_silu_(x: Tensor) -> dict[str, Tensor]:
    """The channels beside stay as they were."""
    return {"out": torch.cat([F.silu(x[:, :SILU_WIDTH]), x[:, SILU_WIDTH:]], dim=1)}


def expected_silu_and_mul(x: Tensor) -> dict[str, Tensor]:
    gate, up = x.chunk(2, dim=-1)
    return {"out": F.silu(gate) * up}


def expected_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight


def expected_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> dict[str, Tensor]:
    h = ALPHA * residual + BETA * x
    return {"out": expected_norm(h, weight), "residual": h}


def expected_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {"out": expected_norm(x, weight) * torch.sigmoid(gate)}


OPERATIONS = {
    "silu_": Operation((16384,), 2 * SILU_WIDTH, call_silu_, expected_silu_),
    "silu_and_mul": Operation(
        (22016,), 22016 + 11008, lambda kernels, x: (kernels.silu_and_mul(x),), expected_silu_and_mul
    ),
    "add_rms_norm": Operation(
        (4096, 4096),
        4 * 4096,
        lambda kernels, *x: kernels.add_rms_norm(*x, EPS, ALPHA, BETA),
        expected_add_rms_norm,
        has_weight=True,
    ),
    "gated_rms_norm": Operation(
        (4096, 4096),
        3 * 4096,
        lambda kernels, *x: (kernels.gated_rms_norm(*x, EPS),),
        expected_gated_rms_norm,
        has_weight=True,
    ),
}


@dataclass(frozen=True)
class AroundCase:
    operation: str  # of OPERATIONS
    tokens: int
    group: str = "around"
    num_steps: int = 1

    @property
    def label(self) -> str:
        return f"{self.operation}, T={self.tokens}"

    @property
    def name(self) -> str:
        return f"around/{self.operation}/t{self.tokens}"

    def inputs(self, seed: int, *, checked: bool) -> tuple[Tensor, ...]:
        """[T, width] each, then the norm's weight [width]."""
        operation = OPERATIONS[self.operation]
        shapes = [(self.tokens, width) for width in operation.widths]
        weights = [operation.widths[:1]] if operation.has_weight else []
        return tuple(normal(seed + i, *shape) for i, shape in enumerate([*shapes, *weights]))

    def work(self, inputs: tuple[Tensor, ...] | None = None) -> Work:
        return Work(2 * self.tokens * OPERATIONS[self.operation].num_moved)

    def expected(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return OPERATIONS[self.operation].expected(*[x.double() for x in inputs])

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, inputs: tuple[Tensor, ...]) -> Bound:
        kernels, call = load("triton"), OPERATIONS[self.operation].call
        return in_one_step(lambda: call(kernels, *inputs))


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
    for heads, label, prompts in (  # where `auto` changes its mind; peers compile anew for every number of heads
        (32, "1 x 8192", (8192,)),
        (16, "2 x 4096", (4096,) * 2),
        (16, "3 x 4096", (4096,) * 3),
        (16, "2 x 512", (512,) * 2),
        (16, "8 x 512", (512,) * 8),
        (8, "1 x 1024", (1024,)),
        (8, "4 x 2048", (2048,) * 4),
    ):
        yield LightningCase(label, heads, prompts, has_peers=False)
    for heads in (64, 16):
        for rows in (1, 8, 32, 64, 128, 256):
            yield LightningCase(f"B={rows}", heads, (), rows)
    for rows in (1, 8, 64):
        yield VerifyCase(64, rows)
    for head_dim in (128, 64):
        yield AttentionCase(is_prefill=False, num_rows=64, length=4096, head_dim=head_dim)
    for rows, length in ((1, 4096), (1, 8192), (4, 2048)):
        yield AttentionCase(is_prefill=True, num_rows=rows, length=length, head_dim=128)
    for tokens in (1, 8, 32, 64, 128, 256, 8192):
        yield MoeCase(tokens)
    for channels, size in ((22016, 4096), (4096, 11008), (4096, 4096), (16384, 4096), (32000, 4096)):
        yield LinearCase(channels, size)
    for sampler in SAMPLERS:
        yield SamplingCase(sampler)
    for operation, tokens in itertools.product(OPERATIONS, (8192, 128)):
        yield AroundCase(operation, tokens)
