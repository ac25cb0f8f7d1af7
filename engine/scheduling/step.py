"""What the scheduler has chosen for a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..memory.operations import Operation, StepSave
from ..sequence import Sequence
from .continuation import ContinuedStep


@dataclass(slots=True)
class ScheduledBatch:
    """The rows of one step: prefill rows first, then decode rows, each with the tokens it brings. Complete once it is
    made: nothing asks the sequences again what this step is to do.

    A step with drafts has no other rows: each is a sequence's last token and its drafts, as one of the prefill rows.
    """

    sequences: list[Sequence]
    num_scheduled_tokens: list[int]
    num_prefills: int
    operations: list[Operation] = field(default_factory=list)  # to make before anything is computed
    advance: ContinuedStep | None = None  # from the step before, where this one follows from it
    snapshots: list[StepSave] = field(default_factory=list)  # of prefill rows, to make while they are computed
    drafts: list[list[int]] = field(default_factory=list)  # of each row of a step with drafts; some may be empty
    started: list[Sequence] = field(default_factory=list)  # sequences that leave the queue with this step
    num_finished: int = 0  # sequences that have, so far
    completing_prefills: list[int] = field(init=False)  # prefill rows whose tokens are all computed after this step

    def __post_init__(self) -> None:
        self.completing_prefills = list(range(self.num_prefills))
        if self.num_prefills and not self.drafts:
            prompts = zip(self.sequences, self.num_scheduled_tokens, self.completing_prefills, strict=False)
            self.completing_prefills = [row for s, count, row in prompts if s.num_uncomputed_tokens == count]

    @property
    def is_empty(self) -> bool:
        return not self.sequences

    @property
    def num_decodes(self) -> int:
        return len(self.sequences) - self.num_prefills

    @property
    def num_drafted(self) -> int:
        """Rows of a step with drafts: none, or every row."""
        return len(self.drafts)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some prompt's tokens are to be scored."""
        prompts = self.sequences[: self.num_prefills]
        return any(s.sampling_params.prompt_logprobs is not None and not s.num_output_tokens for s in prompts)

    @property
    def completing_rows(self) -> list[int]:
        """`completing_prefills` and the decode rows: each gets its next token."""
        return [*self.completing_prefills, *range(self.num_prefills, len(self.sequences))]
