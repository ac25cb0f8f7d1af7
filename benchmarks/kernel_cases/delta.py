"""The gated delta rule with its convolution, norms and gates: prompts, mixed and decode steps, rows with drafts.

Shapes of Qwen3.5-9B and Qwen3.5-35B-A3B: 16 key heads, 32 value heads, head dims of 128.
"""

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
from leyden.kernels.bundles import Rows
from leyden.kernels.delta.contract import CHUNK, TAPS, DeltaInputs, DeltaRing, DeltaState, DeltaWeights
from leyden.kernels.delta.reference import recurrence
from torch import Tensor

KEY_HEADS, HEADS, DIM = 16, 32, 128
CHANNELS = (2 * KEY_HEADS + HEADS) * DIM
RING = 16  # every decode case takes as many steps, from an empty ring to the fold
CONTEXT = 4096  # tokens of a sequence before a case's first one
STATE_BYTES = 4 * HEADS * DIM * DIM
TOKEN_BYTES = 2 * (CHANNELS + HEADS * DIM + 2 * HEADS)  # raw values, output and the gates' inputs
TAIL_BYTES = 2 * (TAPS - 1) * CHANNELS


@functools.cache
def layer_weights() -> DeltaWeights:
    """Rates as layers of this kind start from: steps of 0.001 to 0.1, decays of 1 to 16."""
    draws = torch.Generator(base.DEVICE).manual_seed(0)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(HEADS, device=base.DEVICE, generator=draws) * (high - low) + low

    steps = torch.exp(uniform(math.log(0.001), math.log(0.1)))
    conv = torch.randn(TAPS, CHANNELS, device=base.DEVICE, generator=draws) * 0.5
    return DeltaWeights(conv, torch.log(uniform(1, 16)), steps + torch.log(-torch.expm1(-steps)))


class DeltaSet(NamedTuple):
    """S steps of T tokens each, of rows in shuffled slots of a pool with three to spare."""

    projected: Tensor  # [S, T, C + 2 Hv], as one projection leaves raw values, steps and strengths
    pool: DeltaState
    rows: Rows
    context_lens: Tensor  # [B] int32, before the first step
    out: Tensor  # [S, T, Hv, V]

    def inputs(self, step: int, start: int = 0) -> DeltaInputs:
        """Of a step's tokens from `start` on."""
        return DeltaInputs(*self.projected[step, start:].split([CHANNELS, HEADS, HEADS], dim=-1))

    def contexts(self, step: int) -> Tensor:
        return self.context_lens + step * self.rows.max_len

    def sequences(self) -> DeltaInputs:
        """All steps' tokens, row after row."""
        flat = self.projected.transpose(0, 1).flatten(0, 1)
        return DeltaInputs(*flat.split([CHANNELS, HEADS, HEADS], dim=-1))


def make_set(seed: int, lengths: tuple[int, ...], num_steps: int, *, checked: bool) -> DeltaSet:
    """checked: every second row of several tokens is new, in a slot full of NaN."""
    num_rows, num_tokens = len(lengths), sum(lengths)
    new = torch.tensor([checked and row % 2 == 1 and lengths[row] > 1 for row in range(num_rows)], device=base.DEVICE)
    slots = torch.tensor(random.Random(0).sample(range(num_rows + 3), num_rows), dtype=torch.int32, device=base.DEVICE)
    starts = torch.tensor([0, *lengths], device=base.DEVICE).cumsum(0).int()
    state = normal(seed + 1, num_rows + 3, HEADS, DIM, DIM).float() * 0.3
    pool = DeltaState(state, normal(seed + 2, num_rows + 3, TAPS, CHANNELS))
    for part in pool:
        part[slots[new].long()] = math.nan
    projected = normal(seed, num_steps, num_tokens, CHANNELS + 2 * HEADS)
    out = projected.new_full((num_steps, num_tokens, HEADS, DIM), math.nan)
    contexts = torch.where(new, 0, CONTEXT).int()
    return DeltaSet(projected, pool, Rows(slots, ~new, starts, max(lengths)), contexts, out)


def new_ring(num_slots: int, dtype: torch.dtype) -> DeltaRing:
    """dtype: of corrections."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full((num_slots, *shape), math.nan, dtype=dtype, device=base.DEVICE)

    return DeltaRing(
        key=empty(KEY_HEADS, RING, DIM, dtype=base.DTYPE),
        correction=empty(HEADS, RING, DIM, dtype=dtype),
        decay=empty(HEADS, RING, dtype=torch.float32),
        raw=empty(1, RING, CHANNELS, dtype=base.DTYPE),
        num_pending=torch.zeros(0, dtype=torch.int32, device=base.DEVICE),
    )


def no_places() -> Tensor:
    return torch.zeros(0, 3, dtype=torch.int32, device=base.DEVICE)


@dataclass(frozen=True)
class DeltaCase:
    """Prompts of `lengths` and `num_decodes` rows of one token; all have a state when timed."""

    label: str
    lengths: tuple[int, ...]
    num_decodes: int = 0

    @property
    def group(self) -> str:
        return "delta-prefill" if self.lengths else "delta-decode"

    @property
    def name(self) -> str:
        return f"{self.group}/{self.label.replace(' ', '').replace('B=', 'b')}"

    @property
    def num_steps(self) -> int:
        return 1 if self.lengths else RING

    @property
    def all_lengths(self) -> tuple[int, ...]:
        return (*self.lengths, *[1] * self.num_decodes)

    def inputs(self, seed: int, *, checked: bool) -> DeltaSet:
        return make_set(seed, self.all_lengths, self.num_steps, checked=checked)

    def work(self, inputs: DeltaSet | None = None) -> Work:
        """The state once in and once out, as plain decode and prompts must; products of a chunk but for its solve."""
        num_tokens, num_rows = sum(self.all_lengths), len(self.all_lengths)
        rows = num_rows * (2 * STATE_BYTES + TAIL_BYTES) + len(self.lengths) * TAIL_BYTES
        if not self.lengths:
            rows += num_rows * TAIL_BYTES // (TAPS - 1) + layer_weights().conv.nbytes
        flops = sum(self.lengths) * DIM * (HEADS * (6 * DIM + 4 * CHUNK) + KEY_HEADS * 4 * CHUNK)
        return Work(num_tokens * TOKEN_BYTES + rows, flops)

    def expected(self, inputs: DeltaSet) -> dict[str, Tensor]:
        rows = inputs.rows._replace(starts=inputs.rows.starts * self.num_steps)
        out, state = recurrence(inputs.sequences(), layer_weights(), inputs.pool, rows, inputs.context_lens)
        return {"out": out, "delta state": state}

    def implementations(self) -> dict[str, Implementation]:
        binds: dict[str, Callable[[DeltaSet], Bound]] = {"chunk": self.bind_chunk}
        if not self.lengths:
            binds["replay fp32"] = functools.partial(bind_replay, dtype=torch.float32)
            binds["replay fp16"] = functools.partial(bind_replay, dtype=torch.float16)
        return {name: Implementation(bind) for name, bind in binds.items()}

    def bind_chunk(self, x: DeltaSet) -> Bound:
        """Prompts in chunks, and plain decode."""
        delta, weights, none = base.our_kernels().delta, layer_weights(), no_places()
        cut, cut_tokens = len(self.lengths), sum(self.lengths)
        slots, continues, starts, longest = x.rows
        prompts = Rows(slots[:cut], continues[:cut], starts[: cut + 1], longest)
        decodes = Rows(slots[cut:], continues[cut:], starts[cut:], 1)
        contexts = [x.contexts(i) for i in range(self.num_steps)]

        def step(i: int) -> None:
            if cut:
                some = DeltaInputs(*(part[:cut_tokens] for part in x.inputs(i)))
                out = x.out[i, :cut_tokens]
                delta.prefill(some, weights, x.pool, prompts, contexts[i][:cut], none, x.pool, out)
            if self.num_decodes:
                some, out = x.inputs(i, cut_tokens), x.out[i, cut_tokens:]
                delta.decode(some, weights, x.pool, decodes, contexts[i][cut:], out)

        return Bound(step, lambda: (x.out.transpose(0, 1).flatten(0, 1), x.pool.state[x.rows.slots]))


def bind_replay(x: DeltaSet, dtype: torch.dtype) -> Bound:
    """From an empty ring to the fold, so that the pool is complete after the last step. dtype: of states and
    corrections."""
    delta, weights = base.our_kernels().delta, layer_weights()
    pool = x.pool._replace(state=x.pool.state.to(dtype))
    ring = new_ring(len(pool.state), dtype)
    pending = [torch.full_like(x.rows.slots, i) for i in range(RING)]
    contexts = [x.contexts(i) for i in range(RING)]

    def step(i: int) -> None:
        waiting = ring._replace(num_pending=pending[i])
        delta.replay(x.inputs(i), weights, pool, waiting, x.rows, contexts[i], x.out[i])

    return Bound(step, lambda: (x.out.transpose(0, 1).flatten(0, 1), pool.state[x.rows.slots]))


@dataclass(frozen=True)
class DeltaVerifyCase:
    """Rows of a few tokens, most of them drafts, whose rings are then full: half was waiting, half is new."""

    num_rows: int
    group: str = "delta-verify"
    num_steps: int = 1
    WAITING = NEW = RING // 2

    @property
    def label(self) -> str:
        return f"B={self.num_rows}"

    @property
    def name(self) -> str:
        return f"delta-verify/b{self.num_rows}"

    def inputs(self, seed: int, *, checked: bool) -> DeltaSet:
        """Two steps: the tokens that wait, then the new ones."""
        return make_set(seed, (self.NEW,) * self.num_rows, 2, checked=False)

    def work(self, inputs: DeltaSet | None = None) -> Work:
        place = 2 * KEY_HEADS * DIM + 4 * HEADS * DIM + 4 * HEADS
        kept = (self.WAITING + self.NEW) * place + self.NEW * 2 * CHANNELS
        return Work(self.num_rows * (STATE_BYTES + TAIL_BYTES + self.NEW * TOKEN_BYTES + kept))

    def expected(self, inputs: DeltaSet) -> dict[str, Tensor]:
        split = inputs.projected.unflatten(1, (self.num_rows, self.NEW)).transpose(0, 1).flatten(0, 2)
        rows = inputs.rows._replace(starts=inputs.rows.starts * 2)
        flat = DeltaInputs(*split.split([CHANNELS, HEADS, HEADS], dim=-1))
        out, _ = recurrence(flat, layer_weights(), inputs.pool, rows, inputs.context_lens)
        return {"out": out.unflatten(0, (self.num_rows, 2, self.NEW))[:, 1].flatten(0, 1)}

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, x: DeltaSet) -> Bound:
        delta, weights = base.our_kernels().delta, layer_weights()
        ring = new_ring(len(x.pool.state), torch.float32)
        empty, waiting = (ring._replace(num_pending=torch.full_like(x.rows.slots, n)) for n in (0, self.WAITING))
        delta.verify(x.inputs(0), weights, x.pool, empty, x.rows, x.contexts(0), x.out[0])
        contexts = x.contexts(1)

        def step(_: int) -> None:
            delta.verify(x.inputs(1), weights, x.pool, waiting, x.rows, contexts, x.out[1])

        return Bound(step, lambda: (x.out[1],))
