"""Sequences that go through the slots of one pool by any operation of the gated delta rule, and their oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from types import ModuleType

import torch
from leyden.kernels.bundles import Rows
from leyden.kernels.delta.contract import TAPS, DeltaInputs, DeltaRing, DeltaState, DeltaWeights
from leyden.kernels.delta.reference import recurrence
from torch import Tensor

RING = 16
SPARE = 3  # slots that belong to no sequence
NAN_WITH_PAYLOAD = 0x7FABCDEF  # which arithmetic would not keep


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def strided(x: Tensor) -> Tensor:
    """The same values, whose first stride leaves room for others, as in a wide projection."""
    wide = torch.full((x.shape[0], x[:1].numel() + 16), float("nan"), dtype=x.dtype, device=x.device)
    view = wide[:, 16:].view(x.shape) if x.dim() == 2 else wide[:, 16:].unflatten(1, x.shape[1:])
    return view.copy_(x)


def interpreted(name: str) -> bool:
    """Whether the implementation runs in Triton's interpreter, where a program takes a tenth of a second."""
    return name == "triton" and not torch.cuda.is_available()


class Sequences:
    """Sequence r starts at position contexts[r]: at 0 in a dirty slot, elsewhere from a random state and tail.

    What no operation may read is NaN: slots of new sequences, tail places of tokens before the last three, ring places
    where no token waits. A padding row of NaN stands in every step, behind its first row.
    """

    def __init__(
        self,
        ops: ModuleType,
        device: torch.device,
        num_tokens: int,
        contexts: Sequence[int] = (0,),
        *,
        key_heads: int = 1,
        group: int = 2,
        K: int = 16,
        V: int = 16,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        key_dtype: torch.dtype | None = None,
        decays: Sequence[float] = (0.02, 0.7, 4.0, 0.2),
    ) -> None:
        """decays: typical -g of the value heads, by turns. The ring's keys have the inputs' dtype unless told."""
        generator = torch.Generator().manual_seed(num_tokens + sum(contexts))
        self.ops, self.device, self.contexts = ops, device, list(contexts)
        rows, heads = len(contexts), key_heads * group
        channels, num_slots = 2 * key_heads * K + heads * V, rows + SPARE

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        def unread(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, float("nan"), dtype=dtype, device=device)

        self.tokens = DeltaInputs(
            normal(rows, num_tokens, channels, dtype=dtype),
            normal(rows, num_tokens, heads, dtype=dtype),
            normal(rows, num_tokens, heads, dtype=dtype),
        )
        decay = torch.tensor([decays[h % len(decays)] for h in range(heads)], device=device).log()
        self.weights = DeltaWeights(normal(TAPS, channels) * 0.5, decay, normal(heads) * 0.3)
        self.slots = torch.randperm(num_slots, generator=generator)[:rows].tolist()
        self.pool = DeltaState(
            normal(num_slots, heads, V, K, dtype=state_dtype), unread(num_slots, TAPS, channels, dtype=dtype)
        )
        for slot, context in zip(self.slots, contexts, strict=True):
            if context == 0:
                self.pool.state[slot] = float("nan")
            for position in range(max(0, context - TAPS + 1), context):
                self.pool.tail[slot, position % TAPS] = normal(channels, dtype=dtype)
        self.ring = DeltaRing(
            unread(num_slots, key_heads, RING, K, dtype=key_dtype or dtype),
            unread(num_slots, heads, RING, V, dtype=state_dtype),
            unread(num_slots, heads, RING),
            unread(num_slots, 1, RING, channels, dtype=dtype),
            torch.zeros(0, dtype=torch.int32, device=device),
        )
        self.spare = [slot for slot in range(num_slots) if slot not in self.slots]
        for part in (*self.pool, *self.ring[:4]):
            if part.element_size() == 4:
                part[self.spare[0]].view(torch.int32).fill_(NAN_WITH_PAYLOAD)
        self.first = DeltaState(*(part.clone() for part in self.pool))
        self.first_ring = [part.clone() for part in self.ring[:4]]
        self.computed, self.pending = [0] * rows, [0] * rows
        self.outs: list[list[Tensor]] = [[] for _ in range(rows)]

    @property
    def all(self) -> range:
        return range(len(self.slots))

    def position(self, row: int) -> int:
        return self.contexts[row] + self.computed[row]

    def next(self, row: int, n: int) -> DeltaInputs:
        """The sequence's next n tokens."""
        return DeltaInputs(*(x[row, self.computed[row] : self.computed[row] + n] for x in self.tokens))

    def move(self, row: int, slot: int) -> None:
        """Give the sequence another slot, in pools that end with it; all other slots are zeros."""

        def moved(part: Tensor) -> Tensor:
            wide = part.new_zeros(slot + 1, *part.shape[1:])
            wide[slot] = part[self.slots[row]]
            return wide

        self.pool, self.first = DeltaState(*map(moved, self.pool)), DeltaState(*map(moved, self.first))
        self.ring = DeltaRing(*map(moved, self.ring[:4]), self.ring.num_pending)
        self.first_ring = [part.clone() for part in self.ring[:4]]
        self.slots[row], self.spare = slot, [0, slot // 2, slot - 1]

    def rows_of_one(self, slots: Tensor) -> Rows:
        """Rows of one token in these slots, all of which continue."""
        starts = torch.arange(len(slots) + 1, dtype=torch.int32, device=self.device)
        return Rows(slots, torch.ones_like(slots, dtype=torch.bool), starts, 1)

    def prefill(
        self,
        lengths: Sequence[int] | int,
        places: Sequence[tuple[int, int, int]] = (),
        snapshots: DeltaState | None = None,
        chosen: Sequence[int] | None = None,
    ) -> None:
        """places: (sequence, n, snapshot), in the order of sequences."""
        lengths = self._lengths(lengths, chosen)
        index = {row: i + (i > 0) for i, row in enumerate(lengths)}  # a padding row stands behind the first
        saved = torch.tensor([(index[row], n, c) for row, n, c in places], dtype=torch.int32, device=self.device)

        def run(inputs: DeltaInputs, rows: Rows, contexts: Tensor, pending: Tensor, out: Tensor) -> Tensor:
            arguments = (
                inputs,
                self.weights,
                self.pool,
                rows,
                contexts,
                saved.view(-1, 3),
                snapshots or self.pool,
                out,
            )
            return self.ops.prefill(*arguments)

        self._step(run, {row: self.next(row, n) for row, n in lengths.items()}, padding=3)
        for row, n in lengths.items():
            self.computed[row] += n

    def decode(self, chosen: Sequence[int] | None = None) -> None:
        def run(inputs: DeltaInputs, rows: Rows, contexts: Tensor, pending: Tensor, out: Tensor) -> Tensor:
            return self.ops.decode(inputs, self.weights, self.pool, rows, contexts, out)

        lengths = self._lengths(1, chosen)
        self._step(run, {row: self.next(row, 1) for row in lengths}, padding=1)
        for row in lengths:
            self.computed[row] += 1

    def replay(self, chosen: Sequence[int] | None = None) -> None:
        def run(inputs: DeltaInputs, rows: Rows, contexts: Tensor, pending: Tensor, out: Tensor) -> Tensor:
            ring = self.ring._replace(num_pending=pending)
            return self.ops.replay(inputs, self.weights, self.pool, ring, rows, contexts, out)

        lengths = self._lengths(1, chosen)
        self._step(run, {row: self.next(row, 1) for row in lengths}, padding=1)
        for row in lengths:
            is_folded = self.position(row) == 0 or self.pending[row] + 1 >= RING
            self.pending[row] = 0 if is_folded else self.pending[row] + 1
            self.computed[row] += 1

    def verify(
        self, lengths: Sequence[int] | int, kept: Sequence[int] | int, chosen: Sequence[int] | None = None
    ) -> None:
        """Tokens behind the first `kept` of a row are not the sequence's own. Folds rings without room first."""
        lengths = self._lengths(lengths, chosen)
        kept = self._lengths(kept, chosen)
        self.fold([row for row, n in lengths.items() if self.pending[row] + n > RING])
        tokens = {}
        for row, n in lengths.items():
            rejected = [x.new_full((n - kept[row], *x.shape[1:]), 3.0) for x in self.next(row, 0)]
            tokens[row] = DeltaInputs(*map(torch.cat, zip(self.next(row, kept[row]), rejected, strict=True)))

        def run(inputs: DeltaInputs, rows: Rows, contexts: Tensor, pending: Tensor, out: Tensor) -> Tensor:
            ring = self.ring._replace(num_pending=pending)
            return self.ops.verify(inputs, self.weights, self.pool, ring, rows, contexts, out)

        self._step(run, tokens, padding=RING + 4)
        for row, n in kept.items():
            self.outs[row][-1] = self.outs[row][-1][:n]
            self.pending[row] += n
            self.computed[row] += n

    def fold(self, chosen: Sequence[int] | None = None) -> None:
        """Rows without waiting tokens are asked for, too; so is slot -1."""
        rows = list(self.all if chosen is None else chosen)
        ring = self.ring._replace(num_pending=self._ints([5] + [self.pending[row] for row in rows]))
        slots, contexts = [-1] + [self.slots[row] for row in rows], [9] + [self.position(row) for row in rows]
        self.ops.fold(self.pool, ring, self._ints(slots), self._ints(contexts))
        for row in rows:
            self.pending[row] = 0

    def oracle(self) -> tuple[Tensor, Tensor]:
        """Outputs [T, Hv, V] of all tokens so far, sequence after sequence, and final states, in float64."""
        inputs = [torch.cat([x[row, :n] for row, n in enumerate(self.computed)]) for x in self.tokens]
        starts = self._ints([0, *accumulate(self.computed)])
        rows = Rows(self._ints(self.slots), self._flags(self.contexts), starts, max(self.computed))
        return recurrence(DeltaInputs(*inputs), self.weights, self.first, rows, self._ints(self.contexts))

    def check(self, assert_close: Callable[..., None], bound: float, state_bound: float | None = None) -> None:
        """Every output so far, states and tails, after a fold of what waits; slots of no sequence keep their bits."""
        self.fold()
        expected, final = self.oracle()
        assert_close("out", torch.cat([out for outs in self.outs for out in outs]), expected, bound)
        assert_close("state", self.pool.state[self.slots], final, state_bound or bound)
        for row in self.all:
            self._check_tail(row)
        for part, old in zip((*self.pool, *self.ring[:4]), (*self.first, *self.first_ring), strict=True):
            assert torch.equal(bits(part[self.spare]), bits(old[self.spare]))

    def _check_tail(self, row: int) -> None:
        end, slot = self.position(row), self.slots[row]
        for position in range(max(0, end - TAPS + 1), end):
            t = position - self.contexts[row]
            expected = self.tokens.raw[row, t] if t >= 0 else self.first.tail[slot, position % TAPS]
            assert torch.equal(self.pool.tail[slot, position % TAPS], expected), f"sequence {row}, position {position}"

    def _lengths(self, lengths: Sequence[int] | int, chosen: Sequence[int] | None) -> dict[int, int]:
        """Tokens of the step's sequences."""
        rows = self.all if chosen is None else chosen
        return dict(zip(rows, [lengths] * len(rows) if isinstance(lengths, int) else lengths, strict=True))

    def _step(self, run: Callable[..., Tensor], tokens: dict[int, DeltaInputs], padding: int) -> None:
        order: list[int | None] = list(tokens)
        order.insert(1, None)
        nothing = DeltaInputs(*(x.new_full((padding, *x.shape[2:]), float("nan")) for x in self.tokens))
        pieces = [nothing if row is None else tokens[row] for row in order]
        inputs = DeltaInputs(*(strided(torch.cat(parts)) for parts in zip(*pieces, strict=True)))
        starts = [0, *accumulate(len(piece.raw) for piece in pieces)]
        contexts = [7 if row is None else self.position(row) for row in order]
        slots = self._ints([-1 if row is None else self.slots[row] for row in order])
        rows = Rows(slots, self._flags(contexts), self._ints(starts), max(len(piece.raw) for piece in pieces))
        # The count of a new row is its slot's previous owner's.
        pending = [7 if row is None or not self.position(row) else self.pending[row] for row in order]
        heads, V = self.pool.state.shape[1:3]
        out = strided(inputs.raw.new_full((starts[-1], heads, V), float("nan")))
        returned = run(inputs, rows, self._ints(contexts), self._ints(pending), out)
        assert returned is out
        for row, start, end in zip(order, starts, starts[1:], strict=False):
            if row is None:
                assert out[start:end].count_nonzero() == 0
            else:
                self.outs[row].append(out[start:end])

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _flags(self, values: Sequence[int]) -> Tensor:
        return torch.tensor([value > 0 for value in values], device=self.device)
