"""Prompts and decode by fla-core, an optional package: a second opinion about this folder's own kernels, and a peer to
compare whole models with.

fla-core has the rule alone. Convolution and norms are this folder's first launch, the gates are PyTorch's. States lie
[V, K] on both sides (`state_v_first`), so none is transposed. But fla-core takes states side by side and returns new
ones in float32. Each call therefore copies the states of its rows out of their slots and back, which moves each about
five times, where this folder's kernels read and write it once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundles import Rows
from .contract import TAPS, DeltaInputs, DeltaState, DeltaWeights
from .convolve import convolve
from .tiles import head_counts

OLDEST = (0, 6)  # the version from which on states may lie [V, K]; earlier ones ignore that they are asked to
Rule = Callable[..., tuple[Tensor, Tensor]]


class Fla:
    """`Delta.prefill` and `Delta.decode` by two functions with fla-core's signatures.

    A prompt is planned on the host, once for all layers of a step, so no CUDA graph can hold it. A row with places for
    snapshots is computed in pieces that end there, each of which has launches of its own. Chunks lie at 64 from a
    piece's first token, whatever its position: a prompt that is cut elsewhere differs by rounding.
    """

    def __init__(self, chunk: Rule, recurrent: Rule) -> None:
        """chunk: `chunk_gated_delta_rule`. recurrent: `fused_recurrent_gated_delta_rule`."""
        self._chunk = chunk
        self._recurrent = recurrent
        self._planned: tuple[Rows, Tensor] | None = None
        self._launches: list[_Launch] = []

    def prefill(
        self,
        inputs: DeltaInputs,
        weights: DeltaWeights,
        pool: DeltaState,
        rows: Rows,
        context_lens: Tensor,
        places: Tensor,
        snapshots: DeltaState,
        out: Tensor,
    ) -> Tensor:
        """Contract: `Delta.prefill`. `rows` and `places` are told apart by identity: their content must not change."""
        if self._planned is None or self._planned[0] is not rows or self._planned[1] is not places:
            self._planned, self._launches = (rows, places), _plan(rows, context_lens, places)
        out.zero_()
        for launch in self._launches:
            some = DeltaInputs(*(x[launch.tokens] for x in inputs))
            x = _rule_inputs(some, weights, pool, launch.rows, launch.context_lens)
            packed = {name: part[None] for name, part in x.items()}
            o, states = self._chunk(**packed, **_states(pool, launch.rows), cu_seqlens=launch.rows.starts)
            out[launch.tokens] = o[0]
            pool.state[launch.rows.slots] = states.to(pool.state.dtype)
            slots, positions, tokens = launch.last
            pool.tail[slots, positions] = inputs.raw[tokens]
            for part, saved in zip(pool, snapshots, strict=True):
                saved[launch.snapshots] = part[launch.saved].to(saved.dtype)
        return out

    def decode(
        self,
        inputs: DeltaInputs,
        weights: DeltaWeights,
        pool: DeltaState,
        rows: Rows,
        context_lens: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Contract: `Delta.decode`. Reads nothing on the host."""
        is_real = rows.slots >= 0
        starts = torch.arange(len(rows.slots) + 1, dtype=torch.int32, device=out.device)
        x = _rule_inputs(inputs, weights, pool, rows._replace(starts=starts, max_len=1), context_lens)
        rows = rows._replace(slots=rows.slots.clamp(min=0))
        o, states = self._recurrent(**{name: part[:, None] for name, part in x.items()}, **_states(pool, rows))
        out.copy_(torch.where(is_real[:, None, None], o[:, 0], 0.0))
        positions = torch.where(rows.continues, context_lens, 0) % TAPS
        _write(pool.state, (rows.slots,), states, is_real)
        _write(pool.tail, (rows.slots, positions), inputs.raw, is_real)
        return out


def load() -> Fla:
    """By the package that is installed. Raises ImportError if there is none, or one that is too old."""
    import fla
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    if tuple(int(part) for part in fla.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(f"its version is {fla.__version__}, and {OLDEST[0]}.{OLDEST[1]} or later is needed")
    return Fla(chunk_gated_delta_rule, fused_recurrent_gated_delta_rule)


def gates(inputs: DeltaInputs, weights: DeltaWeights) -> tuple[Tensor, Tensor]:
    """g and beta of each token, [T, Hv] float32."""
    step = inputs.step.float() + weights.step_bias
    return -weights.decay.exp() * F.softplus(step), inputs.strength.float().sigmoid()


def _rule_inputs(
    inputs: DeltaInputs, weights: DeltaWeights, pool: DeltaState, rows: Rows, context_lens: Tensor
) -> dict[str, Tensor]:
    """q, k, v, g, beta of each token, [T, heads, ...]. Those of padding rows are undefined."""
    dims = key_heads, num_heads, K, V = head_counts(inputs, pool)
    x = convolve(inputs, weights, pool, rows, context_lens, dims)
    q, k, v = x.split([key_heads * K, key_heads * K, num_heads * V], dim=1)
    g, beta = gates(inputs, weights)
    heads = {"q": q.unflatten(1, (key_heads, K)), "k": k.unflatten(1, (key_heads, K)), "v": v.unflatten(1, (-1, V))}
    return {**heads, "g": g, "beta": beta}


def _states(pool: DeltaState, rows: Rows) -> dict[str, Any]:
    """The arguments about states: those before the rows, [B, Hv, V, K] float32, zeros in a new row."""
    states = pool.state[rows.slots].masked_fill(~rows.continues[:, None, None, None], 0.0)
    return {"initial_state": states.float(), "output_final_state": True, "state_v_first": True}


def _write(part: Tensor, index: tuple[Tensor, ...], values: Tensor, is_real: Tensor) -> None:
    """part[index] = values for the real rows, in place, without a look from the host.

    A padding row repeats the write of a real row. If there is none, all write what is there already.
    """
    first = is_real.int().argmax(keepdim=True)
    there = tuple(i[first] for i in index)
    index = tuple(torch.where(is_real, i, i[first]) for i in index)
    shape = [-1] + [1] * (values.dim() - 1)
    values = values.to(part.dtype)
    value = torch.where(is_real[first].view(shape), values[first], part[there])
    part[index] = torch.where(is_real.view(shape), values, value)


class _Piece(NamedTuple):
    """Tokens of a row up to a place for a snapshot, or to the row's end."""

    slot: int
    context_len: int
    start: int  # on the token axis
    end: int
    snapshot: int  # -1 = none

    @property
    def last(self) -> list[tuple[int, int, int]]:
        """(slot, place, token) of each token that stays in the tail."""
        tokens = range(max(self.start, self.end - TAPS + 1), self.end)
        return [(self.slot, (self.context_len + token - self.start) % TAPS, token) for token in tokens]


class _Launch(NamedTuple):
    """One piece of each of some rows, as the operations take them."""

    tokens: Tensor  # [T] int32, on the step's token axis
    rows: Rows  # `starts` counts the launch's own tokens
    context_lens: Tensor  # [B] int32
    last: tuple[Tensor, ...]  # slots, places and tokens of what goes to the tails
    saved: Tensor  # [S] int32, the slots that are copied
    snapshots: Tensor  # [S] int32, to these


def _plan(rows: Rows, context_lens: Tensor, places: Tensor) -> list[_Launch]:
    """The n-th launch has the n-th piece of each row that has so many. Waits for the device."""
    launches: list[list[_Piece]] = []
    for pieces in _pieces(rows, context_lens, places):
        for i, piece in enumerate(pieces):
            launches += [[]] if i == len(launches) else []
            launches[i].append(piece)
    return [_launch(pieces, rows.slots.device) for pieces in launches]


def _pieces(rows: Rows, context_lens: Tensor, places: Tensor) -> list[list[_Piece]]:
    """Of each row that is no padding and has tokens."""
    asked: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for b, n, snapshot in places.tolist():
        if snapshot >= 0:
            asked[b][n] = snapshot
    known = zip(rows.slots.tolist(), rows.continues.tolist(), context_lens.tolist(), strict=True)
    starts = rows.starts.tolist()
    found = []
    for b, (slot, continues, context_len) in enumerate(known):
        first, length = starts[b], starts[b + 1] - starts[b]
        if slot < 0 or not length:
            continue
        ends = asked[b]
        ends.setdefault(length, -1)
        before = context_len if continues else 0
        cuts = zip([0, *ends], ends.items(), strict=False)
        found.append([_Piece(slot, before + start, first + start, first + end, c) for start, (end, c) in cuts])
    return found


def _launch(pieces: list[_Piece], device: torch.device) -> _Launch:
    def ints(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    lengths = [piece.end - piece.start for piece in pieces]
    contexts = ints(piece.context_len for piece in pieces)
    slots, starts = ints(piece.slot for piece in pieces), ints([0, *accumulate(lengths)])
    last = zip(*(token for piece in pieces for token in piece.last), strict=True)
    saved = [piece for piece in pieces if piece.snapshot >= 0]
    return _Launch(
        tokens=ints(token for piece in pieces for token in range(piece.start, piece.end)),
        rows=Rows(slots, contexts > 0, starts, max(lengths)),
        context_lens=contexts,
        last=tuple(map(ints, last)),
        saved=ints(piece.slot for piece in saved),
        snapshots=ints(piece.snapshot for piece in saved),
    )
