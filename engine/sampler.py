"""From logits to tokens. Every row is treated alone, so a text never depends on its neighbours."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from .outputs import TokenLogprobs
from .sequence import Sequence

NEGATIVE_INFINITY = float("-inf")
_MASK64 = (1 << 64) - 1


@dataclass(slots=True)
class Sampled:
    """What was drawn: token_ids [N] int64 on the device; is_valid [N] bool, False where the logits were NaN or inf;
    log-probabilities for the rows that asked."""

    token_ids: Tensor
    is_valid: Tensor
    logprobs: list[TokenLogprobs | None]


def sample(logits: Tensor, sequences: list[Sequence]) -> Sampled:
    """Draw the next token of each sequence. logits: [N, vocab], row i for sequences[i]; not changed.

    The order is that of vLLM: logit bias, min_tokens and penalties, then temperature, min-p, top-k, top-p.
    Log-probabilities are of the raw logits.
    """
    raw = logits.float()
    adjusted = _adjust(raw, sequences)
    best, token_ids = adjusted.max(dim=-1)
    rows = [i for i, sequence in enumerate(sequences) if not sequence.sampling_params.is_greedy]
    if rows:
        drawn = _draw(adjusted[rows] if len(rows) < len(sequences) else adjusted, [sequences[i] for i in rows])
        token_ids[rows] = drawn
    return Sampled(token_ids, torch.isfinite(best), _logprobs(raw, token_ids, sequences))


def token_logprobs(raw: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities of chosen tokens, and the most likely ones beside them.

    raw: [N, vocab] float32 logits; token_ids: [N]; num_top: alternatives wanted per row. One float per token: the entry
    of `top` for the chosen token is the very number in `logprob`.
    """
    table = raw.log_softmax(dim=-1)
    chosen = table.gather(1, token_ids[:, None]).squeeze(1).tolist()
    width = min(max(num_top, default=0), raw.shape[-1])
    values, indices = table.topk(width, dim=-1)
    entries = []
    for i, (token_id, logprob) in enumerate(zip(token_ids.tolist(), chosen, strict=True)):
        top = list(zip(indices[i, : num_top[i]].tolist(), values[i, : num_top[i]].tolist(), strict=True))
        if token_id not in [t for t, _ in top]:
            top.append((token_id, logprob))
        entries.append(TokenLogprobs(token_id, logprob, top))
    return entries


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of its arguments alone: splitmix64 (Steele et al. 2014), 53 bits."""
    z = (seed * 0xD1342543DE82EF95 + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def _adjust(raw: Tensor, sequences: list[Sequence]) -> Tensor:
    """Logits after everything that looks at a sequence's own tokens; `raw` itself when no row asks for it."""
    adjusted = raw
    for i, sequence in enumerate(sequences):
        if not _needs_adjusting(sequence):
            continue
        if adjusted is raw:
            adjusted = raw.clone()
        _add_bias(adjusted[i], sequence)
        _penalise(adjusted[i], sequence)
    return adjusted


def _needs_adjusting(sequence: Sequence) -> bool:
    params = sequence.sampling_params
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or sequence.num_output_tokens < params.min_tokens
    )


def _add_bias(row: Tensor, sequence: Sequence) -> None:
    params = sequence.sampling_params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)
    if sequence.num_output_tokens < params.min_tokens:
        stops = [*params.stop_token_ids, *(() if params.ignore_eos else sequence.eos_token_ids)]
        row[torch.tensor(stops, dtype=torch.int64, device=row.device)] = NEGATIVE_INFINITY


def _penalise(row: Tensor, sequence: Sequence) -> None:
    """Repetition (Keskar et al. 2019) looks at prompt and answer, presence and frequency at the answer alone."""
    params = sequence.sampling_params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(
            list({*sequence.prompt_token_ids, *sequence.output_token_ids}),
            dtype=torch.int64,
            device=row.device,
        )
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.output_token_ids:
        counts = Counter(sequence.output_token_ids)
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * times


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """One token per row by inverse transform: sort, cut the tail, and find where the row's own uniform number falls."""
    device = logits.device
    params = [sequence.sampling_params for sequence in sequences]
    # Far below 1e-6 the division would overflow; every such temperature is greedy but for exact ties.
    temperature = torch.tensor([max(p.temperature, 1e-6) for p in params], device=device)
    values, order = (logits / temperature[:, None]).sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1)
    probabilities = _cut_tail(probabilities, params)
    cumulative = probabilities.cumsum(dim=-1)
    draws = torch.tensor(
        [uniform(s.seed, s.num_output_tokens) for s in sequences], dtype=torch.float64, device=device
    ).float()
    points = draws[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, points, right=True)
    # float32 rounding may push a point past the last kept token.
    last_kept = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(places, last_kept).clamp_(min=0)).squeeze(1)


def _cut_tail(probabilities: Tensor, params: list) -> Tensor:
    """Zero what min-p, top-k and top-p exclude. probabilities: [N, vocab], each row descending."""
    device, vocab = probabilities.device, probabilities.shape[-1]
    if any(p.min_p > 0 for p in params):
        floor = torch.tensor([p.min_p for p in params], device=device)[:, None] * probabilities[:, :1]
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    if any(0 < p.top_k < vocab for p in params):
        limit = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=device)[:, None]
        probabilities = probabilities.masked_fill(torch.arange(vocab, device=device) >= limit, 0.0)
    if any(p.top_p < 1.0 for p in params):
        total = probabilities.sum(dim=-1, keepdim=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        mass = torch.tensor([p.top_p for p in params], device=device)[:, None] * total
        keep_all = torch.tensor([p.top_p >= 1.0 for p in params], device=device)[:, None]
        probabilities = probabilities.masked_fill((before >= mass) & ~keep_all, 0.0)
    return probabilities


def _logprobs(raw: Tensor, token_ids: Tensor, sequences: list[Sequence]) -> list[TokenLogprobs | None]:
    entries: list[TokenLogprobs | None] = [None] * len(sequences)
    rows = [i for i, sequence in enumerate(sequences) if sequence.sampling_params.logprobs is not None]
    if rows:
        num_top = [sequences[i].sampling_params.logprobs or 0 for i in rows]
        for i, entry in zip(rows, token_logprobs(raw[rows], token_ids[rows], num_top), strict=True):
            entries[i] = entry
    return entries
