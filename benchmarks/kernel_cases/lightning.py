"""Lightning attention: prompts, mixed and decode steps, rows with drafts."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from leyden.benchmarks.kernel_cases import base
from leyden.benchmarks.kernel_cases.base import Bound, Implementation, Work, normal
from leyden.kernels.bundles import Ring, Rows
from leyden.models.forward_batch import ForwardBatch
from leyden.models.mixers.cache import LayerCache
from leyden.models.mixers.lightning_backends import LIGHTNING_BACKENDS, LightningCall
from torch import Tensor

HEAD_DIM = 128
RING = 16  # tokens that replay keeps before it writes the state; every decode case takes as many steps


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

    Every set of inputs shares the index tensors: fla keeps derived tensors by the identity of these.
    """
    rows = [*lengths, *[1] * num_decodes]
    slots = random.Random(0).sample(range(len(rows) + 3), len(rows))
    unused = torch.zeros(0, dtype=torch.int64, device=base.DEVICE)
    return ForwardBatch(
        input_ids=unused,
        positions=unused,
        query_start_loc=torch.tensor([0, *rows], device=base.DEVICE).cumsum(0).int(),
        context_lens=torch.tensor(continues, device=base.DEVICE).int() * 4096,
        has_initial_state=torch.tensor(continues, device=base.DEVICE),
        state_indices=torch.tensor(slots, dtype=torch.int32, device=base.DEVICE),
        num_pending=torch.zeros(len(rows), dtype=torch.int32, device=base.DEVICE),
        slot_mapping=unused,
        block_table=unused,
        logits_indices=unused,
        snapshots=unused,
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
        out = torch.full((self.num_steps, tokens, self.heads, HEAD_DIM), math.nan, dtype=qkv.dtype, device=base.DEVICE)
        return LightningInputs(qkv, out, state, alibi_slopes(self.heads).to(base.DEVICE), batch)

    def work(self, inputs: LightningInputs | None = None) -> Work:
        rows, tokens = len(self.lengths) + self.num_decodes, sum(self.lengths) + self.num_decodes
        return Work(tokens * self.heads * 4 * HEAD_DIM * 2 + 2 * rows * self.heads * HEAD_DIM**2 * 4)

    def expected(self, inputs: LightningInputs) -> dict[str, Tensor]:
        batch = inputs.batch
        q, k, v = (sequences(x) for x in inputs.qkv_at())
        rows = batch.rows._replace(starts=batch.query_start_loc * self.num_steps)
        out, state = blocked_recurrence(q, k, v, inputs.slopes, inputs.scale, inputs.state, rows)
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
    rows: Rows,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """The results of `leyden.kernels.lightning.reference.recurrence`, a block of tokens at a time, in float64."""
    slope = slopes.double()[:, None, None]
    position = torch.arange(1, block + 1, device=q.device, dtype=torch.float64)
    within = torch.exp(-slope * (position[:, None] - position).clamp(min=0)).tril()  # [H, C, C]
    out = torch.zeros(v.shape, dtype=torch.float64, device=v.device)
    finals = []
    starts, continues = rows.starts.tolist(), rows.continues.tolist()
    for row, slot in enumerate(rows.slots.tolist()):
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
    kernels = base.our_kernels()
    backend = LIGHTNING_BACKENDS[name](kernels)
    rings = new_rings(x, backend.ring_size)
    cache = LayerCache(slot=(x.state,), ring=rings if backend.ring_size else ())

    def step(i: int) -> None:
        backend.forward(LightningCall(*x.qkv_at(i), x.slopes, x.scale, cache, x.batch, x.out[i]))

    def results() -> tuple[Tensor, Tensor]:
        if backend.ring_size and x.batch.decodes:
            slots = x.batch.decodes.rows.slots
            kernels.lightning.fold(x.slopes, x.state, Ring(*rings, torch.ones_like(slots)), slots)
        return sequences(x.out), x.state[x.batch.state_indices]

    return Bound(step, results)


def new_rings(x: LightningInputs, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values, [num_slots, H, size, 128] each."""
    shape = (*x.state.shape[:2], size, HEAD_DIM)
    return x.qkv.new_full(shape, math.nan), x.qkv.new_full(shape, math.nan)


def bind_replay(x: LightningInputs, dtype: torch.dtype) -> Bound:
    """From an empty ring to the fold, so that the pool is complete after the last step."""
    kernels = base.our_kernels()
    state, rows = x.state.to(dtype), x.batch.rows
    keys, values = new_rings(x, RING)
    pending = torch.arange(RING, dtype=torch.int32, device=base.DEVICE)[:, None].repeat(1, x.batch.num_decodes)

    def step(i: int) -> None:
        ring = Ring(keys, values, pending[i])
        kernels.lightning.replay(*x.qkv_at(i), x.slopes, x.scale, state, ring, rows, x.out[i])

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
        rows = x.batch.rows._replace(starts=torch.arange(self.num_rows + 1) * length)
        flat = (y.flatten(0, 1) for y in (queries, keys, values))
        out, _ = blocked_recurrence(*flat, x.slopes, x.scale, x.state, rows)
        ring = torch.cat([keys, values], dim=-1).transpose(1, 2).double()
        return {"out": out.unflatten(0, (self.num_rows, length))[:, self.WAITING :].flatten(0, 1), "ring": ring}

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, inputs: VerifyInputs) -> Bound:
        kernels, x = base.our_kernels(), inputs.lightning
        ring = Ring(*inputs.rings, inputs.pending)

        def step(_: int) -> None:
            kernels.lightning.verify(*x.qkv_at(0), x.slopes, x.scale, x.state, ring, x.batch.rows, x.out[0])

        return Bound(step, lambda: (x.out[0], torch.cat(inputs.row_rings(), dim=-1)))
