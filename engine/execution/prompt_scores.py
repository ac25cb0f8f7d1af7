"""Log-probabilities of prompt tokens (`prompt_logprobs`), from the hidden states that a step computes anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..outputs import TokenLogprobs
from ..scheduling.step import ScheduledBatch
from .sampler import token_logprobs

NUM_ROWS = 64  # rows of vocabulary-wide float32 that exist at once


class WantedScores(NamedTuple):
    """The prompt tokens of one row to be scored in a step."""

    row: int
    first: int  # place of the row's first token on the step's token axis
    targets: list[int]  # the tokens to score: each is predicted by the hidden state before it
    num_top: int  # alternatives wanted beside each


def wanted_scores(scheduled: ScheduledBatch) -> list[WantedScores]:
    """The scores that the step's prompts ask for. A row's last token predicts the first of the prompt's next chunk."""
    wanted, first = [], 0
    prompts = zip(scheduled.sequences[: scheduled.num_prefills], scheduled.num_scheduled_tokens, strict=False)
    for row, (sequence, count) in enumerate(prompts):
        num_top = sequence.sampling_params.prompt_logprobs
        if num_top is not None and sequence.num_output_tokens == 0:
            start = sequence.num_computed_tokens
            targets = sequence.prompt_token_ids[start + 1 : start + count + 1]
            wanted.append(WantedScores(row, first, targets, num_top))
        first += count
    return wanted


def score(
    wanted: list[WantedScores], hidden: Tensor, compute_logits: Callable[[Tensor], Tensor]
) -> dict[int, list[TokenLogprobs]]:
    """The entries of each row, `NUM_ROWS` tokens at a time. Waits for the device.

    hidden: [T, d], of all tokens of the step; compute_logits: [N, d] -> [N, vocab].
    """
    found: dict[int, list[TokenLogprobs]] = {}
    for row, first, targets, num_top in wanted:
        found[row] = []
        for i in range(0, len(targets), NUM_ROWS):
            part = targets[i : i + NUM_ROWS]
            logits = compute_logits(hidden[first + i : first + i + len(part)]).float()
            token_ids = torch.tensor(part, device=hidden.device)
            found[row] += token_logprobs(logits, token_ids, [num_top] * len(part))
    return found
