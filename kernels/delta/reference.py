"""The gated delta rule in plain PyTorch: the token recurrence that defines it, and the forms that serve on a CPU.

A chunk of m tokens meets the state S [V, K]. With c_a = g_1 + .. + g_a and D_ab = e^{c_a - c_b} (b <= a),

    L = strictly lower(beta_a (k_a . k_b) D_ab),   P = lower((q_a . k_b) D_ab)
    (I + L) U = diag(beta) (V - e^c K S^T),   O = e^c Q S^T + P U,   S' = e^{c_m} S + (e^{c_m - c} U)^T K.

"Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (Yang et al. 2024). Differences of c are
taken before they are raised, so that no factor exceeds 1. Index tensors are read on the host, which costs nothing where
they live on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bundles import Rows
from .contract import CHUNK, TAPS, DeltaInputs, DeltaRing, DeltaState, DeltaWeights


class _Tokens(NamedTuple):
    """Tokens of one row as the rule takes them; q, k of a value head are its key head's."""

    q: Tensor  # [Hv, n, K]
    k: Tensor  # [Hk, n, K]
    v: Tensor  # [Hv, n, V]
    g: Tensor  # [Hv, n], at most 0
    beta: Tensor  # [Hv, n]
    raw: Tensor  # [n, C]

    @property
    def keys(self) -> Tensor:
        """[Hv, n, K]."""
        return self.k.repeat_interleave(self.v.shape[0] // self.k.shape[0], 0)

    def cut(self, start: int, end: int) -> _Tokens:
        q, k, v, g, beta = (x[:, start:end] for x in self[:-1])
        return _Tokens(q, k, v, g, beta, self.raw[start:end])


class _Row(NamedTuple):
    """One row that is no padding."""

    slot: int
    context_len: int
    tokens: slice  # on the flat axis
    num_pending: int  # 0 in a new row


def recurrence(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    rows: Rows,
    context_lens: Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in `dtype`; the oracle of the tests. Changes nothing in place.

    Arguments as in `Delta.prefill`. Returns out [T, Hv, V] and the rows' final states [B, Hv, V, K]; both are zero for
    padding rows.
    """
    num_heads, V, K = pool.state.shape[1:]
    out = torch.zeros(len(inputs.raw), num_heads, V, dtype=dtype, device=inputs.raw.device)
    final = torch.zeros(len(rows.slots), num_heads, V, K, dtype=dtype, device=inputs.raw.device)
    for b, row in _real(rows, context_lens):
        x = _tokens(inputs, weights, pool, row, _before(pool, None, row), dtype)
        s, keys = final[b], x.keys
        if row.context_len:
            s.copy_(pool.state[row.slot])
        for t in range(x.raw.shape[0]):
            k = keys[:, t, :, None]  # [Hv, K, 1]
            s *= torch.exp(x.g[:, t])[:, None, None]
            u = x.beta[:, t, None] * (x.v[:, t] - (s @ k)[..., 0])
            # [Hv, V, 1] * [Hv, 1, K] -> [Hv, V, K]
            s += u[:, :, None] * k.transpose(1, 2)
            out[row.tokens.start + t] = (s @ x.q[:, t, :, None])[..., 0]
    return out, final


def prefill(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    rows: Rows,
    context_lens: Tensor,
    places: Tensor,
    snapshots: DeltaState,
    out: Tensor,
) -> Tensor:
    """Row by row, chunk by chunk in float32. Contract: `Delta.prefill`."""
    wanted = {(b, n): c for b, n, c in places.tolist() if c >= 0}
    assert [*wanted] == sorted(wanted), "places out of order"  # Triton's walk would save other states, and go wrong
    out.zero_()
    for b, row in _real(rows, context_lens):
        before = _before(pool, None, row)
        x = _tokens(inputs, weights, pool, row, before)
        s = _state(pool, row)
        for start, end in _chunks(row.context_len, x.raw.shape[0]):
            o, _, s = _chunk(x.cut(start, end), s)
            out[row.tokens.start + start : row.tokens.start + end] = o.transpose(0, 1)
            if (b, end) in wanted:
                snapshot = wanted[b, end]
                snapshots.state[snapshot] = s
                _write_tail(snapshots.tail[snapshot], torch.cat([before, x.raw[:end]]), row.context_len + end)
        pool.state[row.slot] = s
        _write_tail(pool.tail[row.slot], torch.cat([before, x.raw]), row.context_len + x.raw.shape[0])
    return out


def decode(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    rows: Rows,
    context_lens: Tensor,
    out: Tensor,
) -> Tensor:
    """Row by row. Contract: `Delta.decode`."""
    none = pool.state.new_empty(0, 3, dtype=torch.int32)
    return prefill(inputs, weights, pool, _single(rows), context_lens, none, pool, out)


def replay(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    ring: DeltaRing,
    rows: Rows,
    context_lens: Tensor,
    out: Tensor,
) -> Tensor:
    """Row by row: a draft that is kept. Contract: `Delta.replay`."""
    size = ring.key.shape[2]
    full = rows.continues & (ring.num_pending >= size)  # by drafts: no place is left for the token
    fold(pool, ring, torch.where(full, rows.slots, -1), context_lens)
    waiting = torch.where(full | ~rows.continues, 0, ring.num_pending)
    ring = ring._replace(num_pending=waiting)
    verify(inputs, weights, pool, ring, _single(rows), context_lens, out)
    folded = torch.where(full | ~rows.continues | (waiting + 1 >= size), rows.slots, -1)
    fold(pool, ring._replace(num_pending=waiting + 1), folded, torch.where(rows.continues, context_lens, 0) + 1)
    return out


def verify(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    ring: DeltaRing,
    rows: Rows,
    context_lens: Tensor,
    out: Tensor,
) -> Tensor:
    """One chunk per row from the state after its waiting tokens, which is scratch. Contract: `Delta.verify`."""
    out[rows.starts[0] : rows.starts[-1]] = 0  # tokens before them are another operation's
    for _, row in _real(rows, context_lens, ring.num_pending):
        x = _tokens(inputs, weights, pool, row, _before(pool, ring, row), key_dtype=ring.key.dtype)
        first, end = row.num_pending, row.num_pending + x.raw.shape[0]
        o, u, _ = _chunk(x, _state(pool, row, ring))
        out[row.tokens] = o.transpose(0, 1)
        ring.key[row.slot, :, first:end], ring.correction[row.slot, :, first:end] = x.k, u
        since_fold = ring.decay[row.slot, :, first - 1, None] if first else 0.0
        ring.decay[row.slot, :, first:end] = since_fold + x.g.cumsum(1)
        ring.raw[row.slot, 0, first:end] = x.raw
    return out


def fold(pool: DeltaState, ring: DeltaRing, slots: Tensor, context_lens: Tensor) -> None:
    """Slot by slot. Contract: `Delta.fold`."""
    for slot, count, context_len in zip(slots.tolist(), ring.num_pending.tolist(), context_lens.tolist(), strict=True):
        if slot >= 0 and count:
            _fold(pool, ring, _Row(slot, context_len, slice(0), count))


def _fold(pool: DeltaState, ring: DeltaRing, row: _Row) -> None:
    """The row's waiting tokens into its slot, whose content is ignored where these are all the tokens there are."""
    raw = torch.cat([_tail(pool, row), ring.raw[row.slot, 0, : row.num_pending]])
    pool.state[row.slot] = _state(pool, row, ring)
    _write_tail(pool.tail[row.slot], raw, row.context_len)


def _single(rows: Rows) -> Rows:
    """Rows of one token, with `starts`."""
    starts = torch.arange(len(rows.slots) + 1, dtype=torch.int32, device=rows.slots.device)
    return rows._replace(starts=starts, max_len=1)


def _real(rows: Rows, context_lens: Tensor, num_pending: Tensor | None = None) -> Iterator[tuple[int, _Row]]:
    """(index, row) of the rows that have a slot and tokens."""
    starts = rows.starts.tolist()
    pending = [0] * len(rows.slots) if num_pending is None else num_pending.tolist()
    known = zip(rows.slots.tolist(), rows.continues.tolist(), context_lens.tolist(), pending, strict=True)
    for b, (slot, continues, context_len, count) in enumerate(known):
        if slot >= 0 and starts[b] < starts[b + 1]:
            tokens = slice(starts[b], starts[b + 1])
            yield b, _Row(slot, context_len if continues else 0, tokens, count if continues else 0)


def _chunks(context_len: int, num_tokens: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk, counted from the row's first token."""
    start = 0
    while start < num_tokens:
        end = min(num_tokens, start + CHUNK - (context_len + start) % CHUNK)
        yield start, end
        start = end


def _tail(pool: DeltaState, row: _Row) -> Tensor:
    """Raw values of the three tokens before those that wait, [3, C]; zeros before position 0."""
    ends = row.context_len - row.num_pending
    positions = torch.arange(ends - TAPS + 1, ends, device=pool.tail.device)
    return torch.where((positions >= 0)[:, None], pool.tail[row.slot, positions % TAPS], 0)


def _before(pool: DeltaState, ring: DeltaRing | None, row: _Row) -> Tensor:
    """Raw values of the three tokens before the row's first, [3, C]."""
    tail = _tail(pool, row)
    if ring is None:
        return tail
    return torch.cat([tail, ring.raw[row.slot, 0, : row.num_pending]])[1 - TAPS :]


def _write_tail(tail: Tensor, raw: Tensor, end: int) -> None:
    """The last raw rows of a sequence of `end` tokens into tail [TAPS, C], in place. raw: [>= 3, C]."""
    positions = torch.arange(end - TAPS + 1, end, device=tail.device) % TAPS
    tail[positions] = raw[1 - TAPS :].to(tail.dtype)


def _state(pool: DeltaState, row: _Row, ring: DeltaRing | None = None) -> Tensor:
    """The state before the row's first token, [Hv, V, K] float32, a copy."""
    count = row.num_pending
    s = pool.state[row.slot].float()
    if row.context_len == count:
        s = torch.zeros_like(s)  # a dirty slot may hold NaN: never multiply it
    if ring is None or not count:
        return s
    decay = ring.decay[row.slot, :, :count]
    last = decay[:, -1:]
    u = ring.correction[row.slot, :, :count].float() * torch.exp(last - decay)[..., None]
    keys = ring.key[row.slot, :, :count].float().repeat_interleave(s.shape[0] // ring.key.shape[1], 0)
    # [Hv, V, count] @ [Hv, count, K] -> [Hv, V, K]
    return torch.baddbmm(s * torch.exp(last)[..., None], u.transpose(1, 2), keys)


def _tokens(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    pool: DeltaState,
    row: _Row,
    before: Tensor,
    dtype: torch.dtype = torch.float32,
    key_dtype: torch.dtype | None = None,
) -> _Tokens:
    """A row's tokens after convolution, norms and gates. before: [3, C]; key_dtype: that keys are rounded to."""
    num_heads, V, K = pool.state.shape[1:]
    raw = inputs.raw[row.tokens]
    n, channels = raw.shape
    taps = torch.cat([before.to(raw.dtype), raw]).to(dtype).unfold(0, TAPS, 1)  # [n, C, TAPS]
    x = F.silu((taps * weights.conv.to(dtype).t()).sum(-1))
    key_heads = (channels - num_heads * V) // (2 * K)
    q, k, v = x.split([key_heads * K, key_heads * K, num_heads * V], dim=1)
    q, k = (_l2(y.view(n, key_heads, K)).transpose(0, 1) for y in (q, k))
    if key_dtype is not None:
        k = k.to(key_dtype).to(dtype)
    step, strength = (y[row.tokens].to(dtype) for y in (inputs.step, inputs.strength))
    g = -torch.exp(weights.decay.to(dtype)) * F.softplus(step + weights.step_bias.to(dtype))
    q = (q * K**-0.5).repeat_interleave(num_heads // key_heads, 0)
    return _Tokens(q, k, v.view(n, num_heads, V).transpose(0, 1), g.t(), torch.sigmoid(strength).t(), raw)


def _l2(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _chunk(x: _Tokens, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At most CHUNK tokens from state s [Hv, V, K]: outputs [Hv, m, V], corrections [Hv, m, V] and the state after."""
    c, beta, keys = x.g.cumsum(1)[..., None], x.beta[..., None], x.keys  # [Hv, m, 1]
    decay = torch.exp((c - c.transpose(1, 2)).clamp(max=0.0))  # [Hv, m, m]
    # [Hv, m, K] @ [Hv, K, m] -> [Hv, m, m]
    lower = (torch.bmm(keys, keys.transpose(1, 2)) * decay * beta).tril(-1)
    score = (torch.bmm(x.q, keys.transpose(1, 2)) * decay).tril()
    # [Hv, m, K] @ [Hv, K, V] -> [Hv, m, V]
    difference = beta * (x.v - torch.bmm(keys, s.transpose(1, 2)) * torch.exp(c))
    u = torch.linalg.solve_triangular(lower, difference, upper=False, unitriangular=True)
    o = torch.baddbmm(torch.bmm(x.q, s.transpose(1, 2)) * torch.exp(c), score, u)
    last = c[:, -1:]
    # [Hv, V, m] @ [Hv, m, K] -> [Hv, V, K]
    return o, u, torch.baddbmm(s * torch.exp(last), (u * torch.exp(last - c)).transpose(1, 2), keys)
