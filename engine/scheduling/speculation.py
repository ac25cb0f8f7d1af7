"""Speculative decoding with drafts from the text itself: which sequences draft, and how many drafts are kept.

A step with drafts has *verify rows* alone. A verify row is the last token of a sequence, followed by its drafts. The
device draws a token after each of these tokens, with the same random number as without drafts. Drafts are accepted up
to the first one that differs from the drawn token; that drawn token is kept too. So drafts change neither a text,
greedy or sampled, nor its distribution.

Drafts depend on tokens that the host has seen. So a step with drafts is not launched before the tokens of the step
before it have arrived. A text that does not repeat itself gets no drafts, and its steps are launched ahead as usual.
"""

from __future__ import annotations

from collections.abc import Container

from ..sampling_params import SamplingParams
from ..sequence import Sequence
from .ngrams import NgramProposer


class Speculation:
    """Drafts for the sequences of a step.

    max_drafts: most drafts of one sequence; 0 = no drafts at all. max_rows: a step with more rows has no drafts,
    because its rows keep the device busy.
    """

    def __init__(self, max_drafts: int, max_rows: int) -> None:
        self.max_drafts = max_drafts
        self.max_rows = max_rows
        self.num_drafted = 0
        self.num_accepted = 0
        self.verifying: set[Sequence] = set()  # sequences whose drafts are in a launched step
        self._proposers: dict[Sequence, NgramProposer | None] = {}  # None = `can_draft` forbids drafts

    def applies_to(self, num_rows: int) -> bool:
        return self.max_drafts > 0 and 0 < num_rows <= self.max_rows

    def waits(self, sequences: list[Sequence]) -> bool:
        """Whether some sequence with an unseen last token is likely to have drafts once it is seen. The tokens before
        it tell."""
        return any(sequence.ends_in_unseen and len(self._propose(sequence, 2)) > 1 for sequence in sequences)

    def drafts(self, sequence: Sequence) -> list[int]:
        """Drafts of the tokens after the sequence's last one, which must have been seen."""
        room = sequence.max_fed - sequence.num_computed_tokens - 1  # the answer's last token is never fed
        return self._propose(sequence, min(self.max_drafts, room))

    def observe(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Learn how many of the sequence's drafts were accepted. The sequence may have finished with them."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        proposer = self._proposers.get(sequence)
        if proposer is not None:
            self._extend(sequence, proposer)
            proposer.observe(num_drafted, num_accepted)

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence."""
        self.verifying.discard(sequence)
        self._proposers.pop(sequence, None)

    def check_integrity(self, alive: Container[Sequence]) -> None:
        """Only sequences that are alive are kept. Raises AssertionError."""
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
        """Give the proposer the answer's new tokens, up to the last one that has been seen."""
        answer = sequence.output_token_ids
        known = proposer.num_tokens - sequence.num_prompt_tokens
        proposer.extend(answer[known : len(answer) - sequence.ends_in_unseen])


def can_draft(params: SamplingParams) -> bool:
    """Whether a draw depends on the logits and the position alone. Then several tokens can be drawn in one step."""
    asks_for_more = params.logprobs is not None or params.logit_bias or params.min_tokens or params.grammar is not None
    return not asks_for_more and not params.is_penalised


def num_kept(drafts: list[int], drawn: list[int]) -> int:
    """How many of the `drawn` tokens (one more than `drafts`) are kept: the first, and one after each accepted draft.

    -1 marks a draw from bad logits. Such a draw is kept only as the first; it then ends the text. A later one is left
    to the next step, where it comes first.
    """
    kept = 1
    for draft, token, following in zip(drafts, drawn, drawn[1:], strict=False):
        if draft != token or following < 0:
            break
        kept += 1
    return kept
