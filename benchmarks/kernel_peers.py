"""Other people's linear attention for `benchmarks/kernels.py`: fla-core and two of SGLang's files.

What is not installed is left out. Inputs come as the peer wants them, prepared outside the measured time. The calls fit
fla-core 0.6.0 and SGLang 0.5.23.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from leyden.benchmarks.kernel_cases.base import Bound, Case, Implementation
from leyden.benchmarks.kernel_cases.delta import DIM, HEADS, KEY_HEADS, DeltaCase, DeltaSet, layer_weights
from leyden.benchmarks.kernel_cases.lightning import LightningCase, LightningInputs, returning
from leyden.kernels.delta.convolve import convolve
from leyden.kernels.delta.fla import gates
from torch import Tensor

PEERS = {"lightning_attn": "sglang minimax", "seg_la": "sglang seg_la", "fla": "fla"}  # module: its name here


def implementations(case: Case) -> dict[str, Implementation]:
    """The peers that can be imported, by their names here; none unless the case is linear attention."""
    binds: dict[str, Callable[[Any], Bound]] = {}
    if isinstance(case, DeltaCase) and not (case.lengths and case.num_decodes):
        binds = {"fla": bind_fla_delta_chunk if case.lengths else bind_fla_delta_decode}
    elif isinstance(case, LightningCase) and case.has_peers and case.lengths:
        binds = {"lightning_attn": bind_sglang_minimax_prefill, "seg_la": bind_sglang_seg_la, "fla": bind_fla_chunk}
    elif isinstance(case, LightningCase) and case.has_peers:
        binds = {"lightning_attn": bind_sglang_minimax_decode, "seg_la": bind_sglang_seg_la, "fla": bind_fla_decode}
    available = {module: bind for module, bind in binds.items() if isinstance(peer_module(module), ModuleType)}
    return {PEERS[module]: Implementation(bind, is_peer=True) for module, bind in available.items()}


@functools.cache
def peer_module(name: str) -> ModuleType | str:
    """The module, or why it cannot be had."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def versions() -> dict[str, str | None]:
    """Of what can be imported, SGLang's files have none; says what cannot be, and why."""
    found = {}
    for name in PEERS:
        module = peer_module(name)
        if isinstance(module, ModuleType):
            found[name] = getattr(module, "__version__", None)
        else:
            print(f"without {name}: {module}", file=sys.stderr)
    return found


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


def prepared_delta(x: DeltaSet) -> dict[str, Tensor]:
    """Queries and keys of length 1, values, logarithms of decays and strengths of all steps, [S, T, heads, ...]: the
    work of the layer around the rule, which fla leaves to others."""
    weights, num_steps = layer_weights(), len(x.projected)
    rows = x.rows._replace(starts=x.rows.starts * num_steps)
    inputs = x.sequences()
    flat = convolve(inputs, weights, x.pool, rows, x.context_lens, (KEY_HEADS, HEADS, DIM, DIM))
    parts = flat.split([KEY_HEADS * DIM, KEY_HEADS * DIM, HEADS * DIM], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, DIM)) for part in parts)
    g, beta = gates(inputs, weights)
    named = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    return {name: y.unflatten(0, (-1, num_steps)).transpose(0, 1).contiguous() for name, y in named.items()}


def delta_states(x: DeltaSet) -> Tensor:
    """The rows' incoming states side by side, as fla has them, [B, Hv, K, V]; zeros where a row is new."""
    states = x.pool.state[x.rows.slots].transpose(2, 3).contiguous()
    states[~x.rows.continues] = 0.0
    return states


def bind_fla_delta_chunk(x: DeltaSet) -> Bound:
    """The rule alone: without convolution, norms and gates."""
    module = importlib.import_module("fla.ops.gated_delta_rule")
    y, states = prepared_delta(x), delta_states(x)
    starts = x.rows.starts if len(x.rows.slots) > 1 else None
    results = [states, states]

    def step(_: int) -> None:
        results[:] = module.chunk_gated_delta_rule(
            **y, initial_state=states, output_final_state=True, cu_seqlens=starts
        )

    # With several rows fla reads the number of chunks on the host, which a capture forbids.
    return Bound(step, lambda: (results[0][0], results[1].transpose(2, 3)), capturable=starts is None)


def bind_fla_delta_decode(x: DeltaSet) -> Bound:
    """The rule alone. A step starts from the states that the step before returned, the first from the rows' own."""
    module = importlib.import_module("fla.ops.gated_delta_rule")
    y, initial = prepared_delta(x), delta_states(x)
    last, outs = [initial], list(x.out)

    def step(i: int) -> None:
        states = last[0] if i else initial
        one = {name: part[i][:, None] for name, part in y.items()}
        outs[i], last[0] = module.fused_recurrent_gated_delta_rule(**one, initial_state=states, output_final_state=True)

    return Bound(step, lambda: (torch.stack(outs, 1).flatten(0, 2), last[0].transpose(2, 3)))
