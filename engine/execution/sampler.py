"""From logits to tokens, on the device. Each row is computed alone, so a text never depends on its neighbours.

`sampling_rows` gathers the parameters of a step's sequences on the host as plain arrays, which travel with the batch.
The result is a `Sampled`, whose copy to the host is under way when the next step is launched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels import Kernels
from ...models.forward_batch import Each
from ..outputs import PAIR, TokenLogprobs
from .arrays import Upload


class SamplingInputs(NamedTuple):
    """Parameters of N draws, on the device: the arguments of `Kernels.sample`. Padding rows are greedy."""

    temperature: Annotated[Tensor, Each("draw", "float32")]  # 0 = greedy
    top_k: Annotated[Tensor, Each("draw", "int32")]  # 0 = off
    top_p: Annotated[Tensor, Each("draw", "float32")]
    min_p: Annotated[Tensor, Each("draw", "float32")]
    uniform: Annotated[Tensor, Each("draw", "float32")]  # in [0, 1)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """All sampling parameters of N rows, on the device. An index into [rows or slots, V] is flat."""

    inputs: SamplingInputs
    num_top: list[int | None]  # on the host, per row: alternatives wanted, None = no log-probabilities
    slots: Tensor  # [N] int32, state slots
    bias_at: Tensor  # [M] int64 in [N, V]: places of `bias`, which is -inf for a stop id that min_tokens forbids
    bias: Tensor  # [M] float32
    penalised_rows: Tensor  # [P] int64 in [N]
    penalised_slots: Tensor  # [P] int64
    repetition: Tensor  # [P] float32
    presence: Tensor  # [P] float32
    frequency: Tensor  # [P] float32
    fresh_slots: Tensor  # [Q] int64, the penalised slots whose counts are of a former owner
    prompt_at: Tensor  # [..] int64 in [slots, V], prompt tokens of the fresh slots
    answer_at: Tensor  # [..] int64 in [slots, V], answer tokens of the fresh slots so far
    logprob_rows: Tensor  # [R] int64 in [N]
    mask_rows: Tensor  # [G] int64 in [N], rows with a grammar
    mask: Tensor  # [G, ceil(V / 32)] int32, one bit per token: 1 = allowed

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor] | Upload, num_top: list[int | None]) -> SamplingBatch:
        """arrays: tensors named and shaped as in `SamplingRows.arrays`."""
        inputs = SamplingInputs(*(arrays[name] for name in SamplingInputs._fields))
        names = [field.name for field in dataclasses.fields(cls)][2:]
        return cls(inputs, num_top, **{name: arrays[name] for name in names})


@dataclass(slots=True)
class Sampled:
    """The drawn tokens and their log-probabilities, on their way to the host."""

    tokens: Tensor  # [N] int32, -1 where the logits were NaN or inf
    logprobs: tuple[Tensor, Tensor, Tensor] | None  # of R rows: chosen [R], best values [R, W], their ids [R, W]
    num_top: list[int | None]  # per row: alternatives wanted, None = no log-probabilities
    event: torch.cuda.Event | None

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Wait for the copy; returns the tokens (-1 = bad logits) and log-probabilities of the rows."""
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
    """Draws tokens. Keeps two tables on the device between steps.

    last_tokens [num_slots + 1] int32: the last token drawn for each slot; the last entry serves padding rows.
    counts [num_slots, V] int32, only of sequences with penalties: twice the number of times that a token occurs in the
    answer, plus 1 if it occurs in the prompt.
    """

    def __init__(self, kernels: Kernels, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.kernels = kernels
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.counts.nbytes + self.last_tokens.nbytes

    @staticmethod
    def bytes_per_slot(vocab_size: int) -> int:
        return 4 * vocab_size + 4

    @classmethod
    def bytes_for(cls, num_slots: int, vocab_size: int) -> int:
        """`nbytes` of a sampler of this size: all slots, and the padding rows' entry."""
        return num_slots * cls.bytes_per_slot(vocab_size) + 4

    def draw(self, logits: Tensor, inputs: SamplingInputs, slots: Tensor) -> Tensor:
        """Tokens [N] int32 drawn from logits [N, V], -1 where these are NaN or inf. Writes them to `last_tokens`."""
        tokens = self.kernels.sample(logits, *inputs)
        self.last_tokens[slots] = tokens.clamp(min=0)
        return tokens

    def draw_nothing(self) -> Sampled:
        """A `Sampled` without tokens; its `wait` waits for all work launched so far."""
        return send_home(self.last_tokens[:0])

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """Draw the next token of each row. logits: [N, V], not changed.

        The order is vLLM's: logit bias, min_tokens, penalties, grammars, then temperature, min-p, top-k, top-p.
        Log-probabilities are of the raw logits.
        """
        adjusted = self._adjust(logits, batch)
        tokens = self.draw(adjusted, batch.inputs, batch.slots)
        chosen = tokens.clamp(min=0).long()
        if batch.penalised_rows.shape[0]:
            at = batch.penalised_slots * self.counts.shape[1] + chosen[batch.penalised_rows]
            self.counts.view(-1).scatter_add_(0, at, torch.full_like(at, 2, dtype=torch.int32))
        logprobs = None
        num_top = batch.num_top
        if batch.logprob_rows.shape[0]:
            width = max(num or 0 for num in num_top)
            logprobs = _logprobs(logits[batch.logprob_rows].float(), chosen[batch.logprob_rows], width)
        return send_home(tokens, logprobs, num_top)

    def _adjust(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Logits [N, V] float32 after bias, penalties and grammars; `logits` itself if no row has any of them."""
        if not (batch.bias_at.shape[0] or batch.penalised_rows.shape[0] or batch.mask_rows.shape[0]):
            return logits
        adjusted = logits.to(torch.float32, copy=True)
        adjusted.view(-1).scatter_add_(0, batch.bias_at, batch.bias)
        if batch.penalised_rows.shape[0]:
            self._count_anew(batch)
            adjusted[batch.penalised_rows] = self._penalise(adjusted[batch.penalised_rows], batch)
        if batch.mask_rows.shape[0]:
            allowed = _unpack(batch.mask, adjusted.shape[1])
            adjusted[batch.mask_rows] = adjusted[batch.mask_rows].masked_fill_(~allowed, float("-inf"))
        return adjusted

    def _count_anew(self, batch: SamplingBatch) -> None:
        flat = self.counts.view(-1)
        self.counts.index_fill_(0, batch.fresh_slots, 0)
        flat.scatter_(0, batch.prompt_at, 1)
        flat.scatter_add_(0, batch.answer_at, torch.full_like(batch.answer_at, 2, dtype=torch.int32))

    def _penalise(self, x: Tensor, batch: SamplingBatch) -> Tensor:
        """x [P, V] with penalties: repetition (Keskar et al. 2019) counts prompt and answer, presence and frequency
        the answer alone."""
        counts = self.counts[batch.penalised_slots]
        repetition = batch.repetition[:, None]
        x = torch.where(counts > 0, torch.where(x > 0, x / repetition, x * repetition), x)
        times = counts >> 1
        penalty = batch.presence[:, None] + batch.frequency[:, None] * times
        return x - torch.where(times > 0, penalty, 0.0)


def _unpack(mask: Tensor, size: int) -> Tensor:
    """[G, W] int32 -> its bits as bool [G, size], the lowest of each word first."""
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask[:, :, None] >> bits) & 1).bool().flatten(1)[:, :size]


def token_logprobs(raw: Tensor, token_ids: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities of chosen tokens and of the most likely alternatives. Waits for the device.

    raw: [N, vocab] float32 logits; token_ids: [N]; num_top: alternatives wanted per row.
    """
    return _entries(token_ids.tolist(), *_logprobs(raw, token_ids, max(num_top, default=0)), num_top)


def _logprobs(raw: Tensor, token_ids: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of token_ids [N], the `width` largest [N, W], and their ids [N, W]. raw: [N, vocab] float32."""
    table = raw.log_softmax(dim=-1)
    values, indices = table.topk(min(width, raw.shape[-1]), dim=-1)
    return table.gather(1, token_ids[:, None]).squeeze(1), values, indices


def _entries(
    token_ids: list[int], chosen: Tensor, values: Tensor, indices: Tensor, num_top: list[int]
) -> list[TokenLogprobs]:
    """One entry per token. If `top` holds the chosen token, both give exactly the same number."""
    pairs = np.empty(tuple(values.shape), dtype=[("token_id", "<i4"), ("logprob", "<f4")])
    pairs["token_id"], pairs["logprob"] = indices.cpu().numpy(), values.cpu().numpy()
    is_chosen = pairs["token_id"] == np.array(token_ids, dtype=np.int32)[:, None]
    is_shown = (is_chosen & (np.arange(values.shape[1]) < np.array(num_top)[:, None])).any(axis=1).tolist()
    entries = []
    for i, (token_id, logprob, count) in enumerate(zip(token_ids, chosen.tolist(), num_top, strict=True)):
        top = pairs[i, :count].tobytes()
        entries.append(TokenLogprobs(token_id, logprob, top if is_shown[i] else top + PAIR.pack(token_id, logprob)))
    return entries


def send_home(
    tokens: Tensor, logprobs: tuple[Tensor, Tensor, Tensor] | None = None, num_top: list[int | None] | None = None
) -> Sampled:
    """Start the copies to pinned host memory, and record an event after them. num_top None: only tokens are wanted."""
    num_top = [None] * tokens.shape[0] if num_top is None else num_top
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
