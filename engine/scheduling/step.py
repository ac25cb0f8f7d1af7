"""What the scheduler has chosen for a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..memory.operations import Operation, StepSave
from ..sequence import Sequence
from .continuation import Advance


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The rows of one step: prefill rows first, then decode rows, each with the tokens it brings."""

    sequences: list[Sequence]
    num_scheduled_tokens: list[int]
    num_prefills: int
    operations: list[Operation] = field(default_factory=list)  # to make before anything is computed
    advance: Advance | None = None  # from the batch before, where this one follows from it
    snapshots: list[StepSave] = field(default_factory=list)  # of prefill rows, to make while they are computed
    num_drafted: int = 0  # rows that bring drafts: none, or every row as one of the prefill rows

    @property
    def is_empty(self) -> bool:
        return not self.sequences

    @property
    def num_decodes(self) -> int:
        return len(self.sequences) - self.num_prefills

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some prompt's tokens are to be scored."""
        prompts = self.sequences[: self.num_prefills]
        return any(s.sampling_params.prompt_logprobs is not None and not s.num_output_tokens for s in prompts)

    @property
    def completing_prefills(self) -> list[int]:
        """Prefill rows whose tokens are all computed after this step. Asked before `update`."""
        if self.num_drafted:
            return list(range(self.num_prefills))
        counts, rows = self.num_scheduled_tokens, range(self.num_prefills)
        return [row for row in rows if self.sequences[row].num_uncomputed_tokens == counts[row]]

    @property
    def completing_rows(self) -> list[int]:
        """These and the decode rows: each gets its next token."""
        return [*self.completing_prefills, *range(self.num_prefills, len(self.sequences))]
