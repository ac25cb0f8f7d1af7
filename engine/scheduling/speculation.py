"""Speculative decoding by drafts from the text itself: which sequences bring drafts, and what becomes of them.

A step in which some sequence brings drafts is made of *verify rows* alone: each the last token of a sequence, and its
drafts after it. The device draws a token after each of them, with the very number that it would have used without
drafts. Drafts are kept up to the first that differs from the drawn token, and that drawn token is kept, too. So a text,
greedy or sampled, does not depend on drafts, nor does its distribution.

What to draft depends on tokens that the host has seen, so such a step is not launched ahead of the one before it. A
sequence whose text does not repeat proposes nothing, and steps are launched ahead as ever.
"""

from __future__ import annotations

from collections.abc import Container

from ..sampling_params import SamplingParams
from ..sequence import Sequence
from .ngrams import NgramProposer


class Speculation:
    """Drafts for the sequences of a step. `max_drafts` = most for one sequence. A step of more than `max_rows` rows has
    no drafts: the rows keep the device busy."""

    def __init__(self, max_drafts: int, max_rows: int) -> None:
        self.max_drafts = max_drafts
        self.max_rows = max_rows
        self.num_drafted = 0
        self.num_accepted = 0
        self.verifying: set[Sequence] = set()  # a step is under way that tells which of their drafts are right
        self._proposers: dict[Sequence, NgramProposer | None] = {}  # None: the sequence may not draft

    def applies_to(self, num_rows: int) -> bool:
        return self.max_drafts > 0 and 0 < num_rows <= self.max_rows

    def waits(self, sequences: list[Sequence]) -> bool:
        """Whether some sequence will have drafts once its last token is seen, as far as the tokens before it tell."""
        return any(sequence.ends_in_unseen and len(self._propose(sequence, 2)) > 1 for sequence in sequences)

    def drafts(self, sequence: Sequence) -> list[int]:
        """What may follow the sequence's last token, which has been seen."""
        # The answer's last token is never fed.
        room = sequence.max_fed - sequence.num_computed_tokens - 1
        return self._propose(sequence, min(self.max_drafts, room))

    def observe(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Learn how many of a sequence's drafts were right. It may have finished by the last of them."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        proposer = self._proposers.get(sequence)
        if proposer is not None:
            self._extend(sequence, proposer)
            proposer.observe(num_drafted, num_accepted)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is gone."""
        self.verifying.discard(sequence)
        self._proposers.pop(sequence, None)

    def check_integrity(self, alive: Container[Sequence]) -> None:
        """Nothing is kept of a sequence that is gone. Raises AssertionError."""
        assert all(sequence in alive for sequence in (*self.verifying, *self._proposers))

    def _propose(self, sequence: Sequence, count: int) -> list[int]:
        if count <= 0:
            return []
        if sequence not in self._proposers:
            may_draft = can_draft(sequence.sampling_params)
            self._proposers[sequence] = NgramProposer(sequence.prompt_token_ids) if may_draft else None
        proposer = self._proposers[sequence]
        if proposer is None:
            return []
        self._extend(sequence, proposer)
        return proposer.propose(count)

    def _extend(self, sequence: Sequence, proposer: NgramProposer) -> None:
        """Tell the proposer the tokens that it does not know; the last one may be unseen."""
        answer = sequence.output_token_ids
        known = proposer.num_tokens - sequence.num_prompt_tokens
        proposer.extend(answer[known : len(answer) - sequence.ends_in_unseen])


def can_draft(params: SamplingParams) -> bool:
    """Whether a draw depends on nothing but the logits and the position: no token before it counts otherwise."""
    asks_for_more = params.logprobs is not None or params.logit_bias or params.min_tokens or params.grammar is not None
    return not asks_for_more and not params.is_penalised


def num_kept(drafts: list[int], drawn: list[int]) -> int:
    """How many of the drawn tokens are the text: one after the last fed token, and one after each draft that is right.
    A later one that is bad (-1) is left to the next step, where it is the first and ends the text. drawn: one more than
    drafts."""
    kept = 1
    for draft, token, following in zip(drafts, drawn, drawn[1:], strict=False):
        if draft != token or following < 0:
            break
        kept += 1
    return kept
