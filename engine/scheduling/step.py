"""The batch of one step, as the scheduler builds it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..memory.operations import Operation, StepSave
from ..sequence import Sequence
from .continuation import ContinuedStep


@dataclass(slots=True)
class ScheduledBatch:
    """The rows of one step: prefill rows first, then decode rows, each with its number of tokens.

    A step with drafts has verify rows alone, and counts them as prefill rows. The batch is complete when made: the
    sequences may change afterwards, and the step does not.
    """

    sequences: list[Sequence]
    num_scheduled_tokens: list[int]
    num_prefills: int
    operations: list[Operation] = field(default_factory=list)  # run before the step computes anything
    advance: ContinuedStep | None = None  # the difference to the step before, if this one continues it
    snapshots: list[StepSave] = field(default_factory=list)  # of prefill rows, saved while the step computes
    drafts: list[list[int]] = field(default_factory=list)  # per verify row, some empty; [] = a step without drafts
    started: list[Sequence] = field(default_factory=list)  # sequences that leave the queue with this step
    num_finished: int = 0  # sequences that the scheduler has removed since its start
    completing_prefills: list[int] = field(init=False)  # prefill rows whose sequence has no tokens left after the step

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
        """The number of verify rows: 0, or all rows."""
        return len(self.drafts)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some row's request asks for logprobs of its prompt."""
        prompts = self.sequences[: self.num_prefills]
        return any(s.sampling_params.prompt_logprobs is not None and not s.num_output_tokens for s in prompts)

    @property
    def completing_rows(self) -> list[int]:
        """The rows that get a next token: `completing_prefills` and all decode rows."""
        return [*self.completing_prefills, *range(self.num_prefills, len(self.sequences))]
