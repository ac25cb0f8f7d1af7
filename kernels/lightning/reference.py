"""Lightning attention in plain PyTorch: the token recurrence that defines it, and the forms that serve on a CPU.

Per head with slope s > 0:  S_t = e^{-s} S_{t-1} + k_t v_t^T,  o_t = scale * q_t S_t  (Qin et al. 2024,
Lightning Attention-2). A block of true length m with incoming S, positions a = 1..m:

    o_a = scale * ( e^{-s a} q_a S + sum_{b<=a} e^{-s(a-b)} (q_a . k_b) v_b ),
    S'  = e^{-s m} S + sum_b e^{-s(m-b)} k_b v_b^T.

Index tensors are read on the host, which costs nothing where they live on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bundles import Ring, Rows

BLOCK = 64


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    rows: Rows,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token in `dtype`; the oracle of the tests. Changes nothing in place.

    Arguments as in `Lightning.minimax`. Returns out [T, H, V] and the rows' final states [B, H, K,
    V]; both are zero for padding rows.
    """
    decay = torch.exp(-slopes.to(dtype))[:, None, None]
    out = torch.zeros(v.shape, dtype=dtype, device=v.device)
    final = torch.zeros(len(rows.slots), *state.shape[1:], dtype=dtype, device=v.device)
    starts = rows.starts.tolist()
    for row, slot in enumerate(rows.slots.tolist()):
        if slot < 0:
            continue
        s = final[row]
        if rows.continues[row]:
            s.copy_(state[slot])
        for t in range(starts[row], starts[row + 1]):
            # [H, K, 1] * [H, 1, V] -> [H, K, V]
            s.mul_(decay).add_(k[t].to(dtype)[:, :, None] * v[t].to(dtype)[:, None, :])
            # [H, 1, K] @ [H, K, V] -> [H, 1, V]
            out[t] = (q[t].to(dtype)[:, None, :] @ s)[:, 0] * scale
    return out, final


def minimax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """Rows of any length, block by block in float32. Contract: `Lightning.minimax`."""
    size = max(1, min(BLOCK, rows.max_len))
    position = torch.arange(1, size + 1, device=q.device, dtype=torch.float32)
    slope = slopes.float()[:, None, None]
    lag = position[:, None] - position[None, :]
    decay_score = torch.exp(-slope * lag.clamp(min=0)).tril_().mul_(scale)  # [H, C, C]
    decay_in = torch.exp(-slope * position[:, None]).mul_(scale)  # [H, C, 1]
    decay_out = torch.exp(-slope * (size - position)[:, None])  # [H, C, 1]; a tail of m uses its last m rows
    starts = rows.starts.tolist()
    continues = rows.continues.tolist()
    for row, slot in enumerate(rows.slots.tolist()):
        start, end = starts[row], starts[row + 1]
        if slot < 0 or start == end:
            out[start:end].zero_()
            continue
        s = state[slot].float() if continues[row] else state.new_zeros(state.shape[1:], dtype=torch.float32)
        for t in range(start, end, size):
            m = min(size, end - t)
            # [H, m, K], [H, m, K], [H, m, V]
            b_q, b_k, b_v = (x[t : t + m].transpose(0, 1).float() for x in (q, k, v))
            # [H, m, K] @ [H, K, m] -> [H, m, m]
            score = torch.bmm(b_q, b_k.transpose(1, 2)).mul_(decay_score[:, :m, :m])
            # [H, m, K] @ [H, K, V] -> [H, m, V]
            b_o = torch.bmm(b_q, s).mul_(decay_in[:, :m])
            # [H, m, m] @ [H, m, V] -> [H, m, V]
            out[t : t + m] = torch.baddbmm(b_o, score, b_v).transpose(0, 1)
            # [H, K, m] @ [H, m, V] -> [H, K, V]
            s = torch.baddbmm(s * torch.exp(-slope * m), b_k.transpose(1, 2), b_v * decay_out[:, size - m :])
        state[slot] = s
    return out


def snapshot(
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    rows: Rows,
    places: Tensor,
    snapshots: Tensor,
) -> None:
    """Each state by one product of keys and decayed values, in float32. Contract: `Lightning.snapshot`."""
    slope = slopes.float()[:, None, None]
    for row, count, index in places.tolist():
        if index < 0:
            continue
        start = int(rows.starts[row])
        b_k, b_v = (x[start : start + count].transpose(0, 1).float() for x in (k, v))  # [H, n, K], [H, n, V]
        age = torch.arange(count - 1, -1, -1, device=k.device, dtype=torch.float32)
        # [H, K, n] @ [H, n, V] -> [H, K, V]
        s = torch.bmm(b_k.transpose(1, 2), b_v * torch.exp(-slope * age[:, None]))
        if rows.continues[row]:
            s += state[int(rows.slots[row])].float() * torch.exp(-slope * count)
        snapshots[index] = s


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """One token per row, all rows in one update of float32 states. Contract: `Lightning.decode`."""
    indices, continues = rows.slots, rows.continues
    slots = indices.tolist()
    decay = torch.exp(-slopes.float())[:, None, None]
    if len(slots) == 1 and slots[0] >= 0 and state.dtype == torch.float32:
        _decode_in_place(q[0], k[0], v[0], decay, scale, state[slots[0]], bool(continues[0]), out[0])
        return out
    if any(slot < 0 for slot in slots):
        real = (indices >= 0).nonzero()[:, 0]
        part = out.new_empty(len(real), *out.shape[1:])
        if len(real):
            some = rows._replace(slots=indices[real], continues=continues[real])
            decode(q[real], k[real], v[real], slopes, scale, state, some, part)
        out.zero_()
        out[real] = part
        return out
    s = state.index_select(0, indices).float()  # [B, H, K, V]
    if not all(continues.tolist()):
        s.masked_fill_(~continues[:, None, None, None], 0.0)  # a dirty slot may hold NaN: never multiply it
    # [B, H, K, 1] * [B, H, 1, V] -> [B, H, K, V]
    s.mul_(decay).addcmul_(k.float()[..., None], v.float()[:, :, None, :])
    # [B, H, 1, K] @ [B, H, K, V] -> [B, H, 1, V]
    out.copy_(torch.matmul(q.float()[:, :, None, :], s)[:, :, 0]).mul_(scale)
    state.index_copy_(0, indices.long(), s.to(state.dtype))
    return out


def _decode_in_place(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, s: Tensor, continues: bool, out: Tensor
) -> None:
    """One row: q, k [H, K], v, out [H, V]; s [H, K, V] float32, a view of the pool, updated in place."""
    if continues:
        s.mul_(decay)
    else:
        s.zero_()
    # [H, K, 1] @ [H, 1, V] -> [H, K, V]
    s.baddbmm_(k.float()[:, :, None], v.float()[:, None, :])
    # [H, 1, K] @ [H, K, V] -> [H, 1, V]
    out.copy_(torch.bmm(q.float()[:, None, :], s)[:, 0].mul_(scale))


def seg_la(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """Rows of any length; trailing rows of one token share one update. Contract: `Lightning.seg_la`."""
    starts = rows.starts.tolist()
    n = len(starts) - 1
    while n > 0 and starts[n] - starts[n - 1] == 1:
        n -= 1
    if n:
        longer = Rows(rows.slots[:n], rows.continues[:n], rows.starts[: n + 1], rows.max_len)
        minimax(q, k, v, slopes, scale, state, longer, out)
    if n < len(starts) - 1:
        single = Rows(rows.slots[n:], rows.continues[n:], rows.starts[n:], 1)
        tokens = slice(starts[n], starts[-1])
        decode(q[tokens], k[tokens], v[tokens], slopes, scale, state, single, out[tokens])
    return out


def fold(
    slopes: Tensor,
    state: Tensor,
    ring: Ring,
    slots: Tensor,
) -> None:
    """Row by row. Contract: `Lightning.fold`."""
    for slot, count in zip(slots.tolist(), ring.num_pending.tolist(), strict=True):
        if slot >= 0 and count:
            state[slot] = _replayed_state(slopes, state, ring, slot, count)


def replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    ring: Ring,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """Row by row. Contract: `Lightning.replay`."""
    decay = torch.exp(-slopes.float())[:, None, None]
    places = zip(rows.slots.tolist(), rows.continues.tolist(), ring.num_pending.tolist(), strict=True)
    for row, (slot, continues, count) in enumerate(places):
        if slot < 0:
            out[row].zero_()
            continue
        s = _replayed_state(slopes, state, ring, slot, count) if continues else state[slot].float()
        _decode_in_place(q[row], k[row], v[row], decay, scale, s, continues, out[row])
        if continues and count < ring.key.shape[2] - 1:
            ring.key[slot, :, count], ring.value[slot, :, count] = k[row], v[row]
        else:
            state[slot] = s
    return out


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: float,
    state: Tensor,
    ring: Ring,
    rows: Rows,
    out: Tensor,
) -> Tensor:
    """`minimax` from the rows' replayed states, which are scratch. Contract: `Lightning.verify`."""
    slots, starts = rows.slots.tolist(), rows.starts.tolist()
    replayed = state.new_empty(len(slots), *state.shape[1:], dtype=torch.float32)
    places = zip(slots, rows.continues.tolist(), ring.num_pending.tolist(), starts, starts[1:], strict=False)
    for row, (slot, continues, count, start, end) in enumerate(places):
        if slot < 0:
            continue
        count = count if continues else 0
        if continues:
            replayed[row] = _replayed_state(slopes, state, ring, slot, count)
        for kept, x in ((ring.key, k), (ring.value, v)):
            kept[slot, :, count : count + end - start] = x[start:end].transpose(0, 1)
    scratch = torch.arange(len(slots), device=q.device).where(rows.slots >= 0, -1)
    return minimax(q, k, v, slopes, scale, replayed, rows._replace(slots=scratch, max_len=ring.key.shape[2]), out)


def _replayed_state(slopes: Tensor, state: Tensor, ring: Ring, slot: int, count: int) -> Tensor:
    """The slot's state after its waiting tokens, [H, K, V] float32, a copy."""
    age = torch.arange(count - 1, -1, -1, device=state.device)
    decay = torch.exp(-slopes.float()[:, None] * age)[:, :, None]  # [H, count, 1]
    s = state[slot].float() * torch.exp(-slopes.float() * count)[:, None, None]
    keys, values = (kept[slot, :, :count].float() for kept in (ring.key, ring.value))
    # [H, K, count] @ [H, count, V] -> [H, K, V]
    return torch.baddbmm(s, keys.transpose(1, 2), values * decay)
