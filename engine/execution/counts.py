"""The numbers of rows and tokens of each kind in a step."""

from __future__ import annotations

from dataclasses import dataclass

from ..scheduling.step import ScheduledBatch


@dataclass(frozen=True, slots=True)
class Counts:
    """The fields of `ForwardBatch` that stay on the host."""

    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    max_query_len: int
    num_drafted: int = 0
    num_drafted_tokens: int = 0

    @classmethod
    def of(cls, scheduled: ScheduledBatch) -> Counts:
        prefill_counts = scheduled.num_scheduled_tokens[: scheduled.num_prefills]
        return cls(
            num_prefills=scheduled.num_prefills,
            num_prefill_tokens=sum(prefill_counts),
            num_decodes=scheduled.num_decodes,
            max_query_len=max(prefill_counts, default=1),
            num_drafted=scheduled.num_drafted,
            num_drafted_tokens=sum(prefill_counts) if scheduled.num_drafted else 0,
        )
