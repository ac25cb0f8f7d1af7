"""From logits to tokens, on the device. Every row is treated alone, so a text never depends on its neighbours.

What a step needs of its sequences is gathered on the host into plain arrays (`sampling_arrays`), and travels with the
batch; what comes back is `Sampled`, whose copy to the host is already under way when the next step is launched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels import Kernels
from .outputs import TokenLogprobs
from .sampling_params import SamplingParams
from .sequence import Sequence

NEGATIVE_INFINITY = float("-inf")
_MASK64 = (1 << 64) - 1
_BELOW_ONE = np.float32(1 - 2**-24)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What the N rows to sample ask for, on the device. An index into a table of rows x vocabulary is flat."""

    slots: Tensor  # [N] int64, state slots
    temperature: Tensor  # [N] float32, 0 = greedy
    top_k: Tensor  # [N] int32, 0 = off
    top_p: Tensor  # [N] float32
    min_p: Tensor  # [N] float32
    uniform: Tensor  # [N] float32 in [0, 1)
    bias_at: Tensor  # [M] int64 in [N, V]: logit bias, and -inf for what min_tokens forbids
    bias: Tensor  # [M] float32
    penalised_rows: Tensor  # [P] int64 in [N]
    penalised_slots: Tensor  # [P] int64
    repetition: Tensor  # [P] float32
    presence: Tensor  # [P] float32
    frequency: Tensor  # [P] float32
    fresh_slots: Tensor  # [Q] int64, those of P whose tokens have not been counted in this slot
    prompt_at: Tensor  # [..] int64 in [slots, V], tokens of their prompts
    answer_at: Tensor  # [..] int64 in [slots, V], tokens of their answers so far
    logprob_rows: Tensor  # [R] int64 in [N]


@dataclass(slots=True)
class Sampled:
    """What was drawn, on its way to the host: `tokens` [N] int32, -1 where the logits were NaN or inf."""

    tokens: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None  # of R rows: chosen [R], best values [R, W], their ids [R, W]
    num_top: list[int | None]  # per row, alternatives wanted; None = no log-probabilities at all
    event: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The tokens (-1 = bad logits) and log-probabilities of the rows, once they are on the host."""
        if self.event is not None:
            self.event.synchronize()
        tokens = self.tokens.tolist()
        entries: list[TokenLogprobs | None] = [None] * len(tokens)
        rows = [i for i, num in enumerate(self.num_top) if num is not None]
        if self.logprobs is not None:
            wanted = [self.num_top[i] or 0 for i in rows]
            found = _entries([tokens[i] for i in rows], *self.logprobs, wanted)
            for i, entry in zip(rows, found, strict=True):
                entries[i] = entry
        return tokens, entries


class Sampler:
    """Holds what must not leave the device between steps: each slot's last token, and how often each token occurred.

    counts [num_slots, V] int32: twice the times in the answer, plus 1 if in the prompt; of sequences with penalties.
    """

    def __init__(self, kernels: Kernels, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.kernels = kernels
        self.last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.counts.nbytes + self.last_tokens.nbytes

    @staticmethod
    def bytes_per_slot(vocab_size: int) -> int:
        return 4 * vocab_size + 8

    def sample(self, logits: Tensor, batch: SamplingBatch, num_top: list[int | None]) -> Sampled:
        """Draw the next token of each row. logits: [N, V], not changed.

        The order is that of vLLM: logit bias, min_tokens and penalties, then temperature, min-p, top-k, top-p.
        Log-probabilities are of the raw logits.
        """
        adjusted = self._adjust(logits, batch)
        tokens = self.kernels.sample(adjusted, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.uniform)
        chosen = tokens.clamp(min=0).long()
        self.last_tokens.index_copy_(0, batch.slots, chosen)
        if batch.penalised_rows.shape[0]:
            at = batch.penalised_slots * self.counts.shape[1] + chosen[batch.penalised_rows]
            self.counts.view(-1).scatter_add_(0, at, torch.full_like(at, 2, dtype=torch.int32))
        logprobs = None
        if batch.logprob_rows.shape[0]:
            width = max(num or 0 for num in num_top)
            logprobs = _logprobs(logits[batch.logprob_rows].float(), chosen[batch.logprob_rows], width)
        return _send_home(tokens, logprobs, num_top)

    def _adjust(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Logits after everything that looks at a sequence's own tokens; `logits` itself when no row asks for it."""
        if not batch.bias_at.shape[0] and not batch.penalised_rows.shape[0]:
            return logits
        adjusted = logits.to(torch.float32, copy=True)
        adjusted.view(-1).scatter_add_(0, batch.bias_at, batch.bias)
        if batch.penalised_rows.shape[0]:
            self._count_anew(batch)
            adjusted[batch.penalised_rows] = self._penalise(adjusted[batch.penalised_rows], batch)
        return adjusted

    def _count_anew(self, batch: SamplingBatch) -> None:
        flat = self.counts.view(-1)
        self.counts.index_fill_(0, batch.fresh_slots, 0)
        flat.scatter_(0, batch.prompt_at, 1)
        flat.scatter_add_(0, batch.answer_at, torch.full_like(batch.answer_at, 2, dtype=torch.int32))

    def _penalise(self, x: Tensor, batch: SamplingBatch) -> Tensor:
        """Repetition (Keskar et al. 2019) looks at prompt and answer, presence and frequency at the answer alone."""
        counts = self.counts[batch.penalised_slots]
        repetition = batch.repetition[:, None]
        x = torch.where(counts > 0, torch.where(x > 0, x / repetition, x * repetition), x)
        times = counts >> 1
        penalty = batch.presence[:, None] + batch.frequency[:, None] * times
        return x - torch.where(times > 0, penalty, 0.0)


def sampling_arrays(sequences: list[Sequence], vocab_size: int) -> dict[str, np.ndarray]:
    """The fields of `SamplingBatch` for these sequences, in numpy. Marks those whose tokens will now be counted."""
    params = [sequence.sampling_params for sequence in sequences]
    # Far below 1e-6 the division would overflow; every such temperature is greedy but for exact ties.
    temperatures = [p.temperature and max(p.temperature, 1e-6) for p in params]
    draws = uniform([s.seed for s in sequences], [s.num_output_tokens for s in sequences])
    return {
        "slots": np.array([sequence.state_slot for sequence in sequences], dtype=np.int64),
        "temperature": np.array(temperatures, dtype=np.float32),
        "top_k": np.array([max(p.top_k, 0) for p in params], dtype=np.int32),
        "top_p": np.array([p.top_p for p in params], dtype=np.float32),
        "min_p": np.array([p.min_p for p in params], dtype=np.float32),
        "uniform": np.minimum(draws.astype(np.float32), _BELOW_ONE),
        "logprob_rows": np.array([i for i, p in enumerate(params) if p.logprobs is not None], dtype=np.int64),
        **_bias_arrays(sequences, vocab_size),
        **_penalty_arrays(sequences, vocab_size),
    }


def uniform(seeds: list[int], positions: list[int]) -> np.ndarray:
    """[N] float64 in [0, 1), each a function of its own seed and position: splitmix64 (Steele et al. 2014), 53 bits."""
    z = np.array([seed & _MASK64 for seed in seeds], dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    z += (np.array(positions, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def token_logprobs(raw: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities of chosen tokens, and the most likely ones beside them; waits for the device.

    raw: [N, vocab] float32 logits; token_ids: [N]; num_top: alternatives wanted per row.
    """
    return _entries(token_ids.tolist(), *_logprobs(raw, token_ids, max(num_top, default=0)), num_top)


def _logprobs(raw: Tensor, token_ids: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(those of token_ids [N], the `width` largest [N, W], their ids [N, W]); raw: [N, vocab] float32 logits."""
    table = raw.log_softmax(dim=-1)
    values, indices = table.topk(min(width, raw.shape[-1]), dim=-1)
    return table.gather(1, token_ids[:, None]).squeeze(1), values, indices


def _entries(
    token_ids: list[int], chosen: Tensor, values: Tensor, indices: Tensor, num_top: list[int]
) -> list[TokenLogprobs]:
    """One float per token: the entry of `top` for the chosen token is the very number in `logprob`."""
    entries = []
    rows = zip(token_ids, chosen.tolist(), values.tolist(), indices.tolist(), num_top, strict=True)
    for token_id, logprob, best, ids, count in rows:
        top = list(zip(ids[:count], best[:count], strict=True))
        if token_id not in ids[:count]:
            top.append((token_id, logprob))
        entries.append(TokenLogprobs(token_id, logprob, top))
    return entries


def _send_home(tokens: Tensor, logprobs: tuple[Tensor, Tensor, Tensor] | None, num_top: list[int | None]) -> Sampled:
    """Start the copies to the host, into pinned memory, behind an event."""
    if tokens.device.type != "cuda":
        return Sampled(tokens, logprobs, num_top, None)

    def home(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    tokens = home(tokens)
    if logprobs is not None:
        logprobs = (home(logprobs[0]), home(logprobs[1]), home(logprobs[2]))
    event = torch.cuda.Event()
    event.record()
    return Sampled(tokens, logprobs, num_top, event)


def _bias_arrays(sequences: list[Sequence], vocab_size: int) -> dict[str, np.ndarray]:
    at: list[int] = []
    bias: list[float] = []
    for row, sequence in enumerate(sequences):
        params = sequence.sampling_params
        if params.logit_bias:
            at += [row * vocab_size + token for token in params.logit_bias]
            bias += params.logit_bias.values()
        if sequence.num_output_tokens < params.min_tokens:
            stops = {*params.stop_token_ids, *(() if params.ignore_eos else sequence.eos_token_ids)}
            at += [row * vocab_size + token for token in stops]
            bias += [NEGATIVE_INFINITY] * len(stops)
    return {"bias_at": np.array(at, dtype=np.int64), "bias": np.array(bias, dtype=np.float32)}


def _penalty_arrays(sequences: list[Sequence], vocab_size: int) -> dict[str, np.ndarray]:
    rows = [row for row, sequence in enumerate(sequences) if _is_penalised(sequence.sampling_params)]
    penalised = [sequences[row] for row in rows]
    fresh = [sequence for sequence in penalised if not sequence.is_counted]
    prompts, answers = [], []
    for sequence in fresh:
        assert sequence.state_slot is not None
        first = sequence.state_slot * vocab_size
        prompts.append(np.array(sequence.prompt_token_ids, dtype=np.int64) + first)
        answers.append(np.array(sequence.output_token_ids, dtype=np.int64) + first)
        sequence.is_counted = True
    params = [sequence.sampling_params for sequence in penalised]
    return {
        "penalised_rows": np.array(rows, dtype=np.int64),
        "penalised_slots": np.array([sequence.state_slot for sequence in penalised], dtype=np.int64),
        "repetition": np.array([p.repetition_penalty for p in params], dtype=np.float32),
        "presence": np.array([p.presence_penalty for p in params], dtype=np.float32),
        "frequency": np.array([p.frequency_penalty for p in params], dtype=np.float32),
        "fresh_slots": np.array([sequence.state_slot for sequence in fresh], dtype=np.int64),
        "prompt_at": np.concatenate([np.empty(0, dtype=np.int64), *prompts]),
        "answer_at": np.concatenate([np.empty(0, dtype=np.int64), *answers]),
    }


def _is_penalised(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)
