"""Two functions with the signatures of fla-core's operations, by the recurrence of the gated delta rule in float32."""

from __future__ import annotations

import torch
from leyden.kernels.delta.fla import Fla
from torch import Tensor


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    output_final_state: bool,
    state_v_first: bool,
) -> tuple[Tensor, Tensor]:
    """q, k: [B, T, Hk, K]; v: [B, T, Hv, V]; g, beta: [B, T, Hv]; initial_state: [B, Hv, V, K]."""
    assert output_final_state and state_v_first
    group, scale = v.shape[2] // k.shape[2], k.shape[3] ** -0.5
    q, k = ((x.float().repeat_interleave(group, 2)) for x in (q * scale, k))
    s, outs = initial_state.float().clone(), []
    for t in range(q.shape[1]):
        s = s * g[:, t, :, None, None].exp()
        u = beta[:, t, :, None] * (v[:, t].float() - (s @ k[:, t, ..., None])[..., 0])
        s = s + u[..., None] * k[:, t, :, None, :]
        outs.append((s @ q[:, t, ..., None])[..., 0])
    return torch.stack(outs, 1).to(v.dtype), s


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    output_final_state: bool,
    state_v_first: bool,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rows on one token axis, [1, T, ...]; cu_seqlens: [B + 1]."""
    starts = cu_seqlens.tolist()
    assert starts[-1] == q.shape[1] and len(starts) == len(initial_state) + 1
    rows = [
        fused_recurrent_gated_delta_rule(
            *(x[:, start:end] for x in (q, k, v)),
            g=g[:, start:end],
            beta=beta[:, start:end],
            initial_state=state[None],
            output_final_state=output_final_state,
            state_v_first=state_v_first,
        )
        for start, end, state in zip(starts, starts[1:], initial_state, strict=False)
    ]
    return torch.cat([out for out, _ in rows], 1), torch.cat([state for _, state in rows])


def stand_in() -> Fla:
    return Fla(chunk_gated_delta_rule, fused_recurrent_gated_delta_rule)
