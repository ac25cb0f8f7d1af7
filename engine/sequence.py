"""A sequence: its tokens and a few counters, from which its other properties follow."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .messages import AddRequest
from .outputs import FinishReason
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .text.grammar import Grammar

# Stands for a token that a launched step draws and that the host has not seen yet.
UNSEEN = -1


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """One request inside the engine.

    A sequence has no phases: `num_computed_tokens` chases `num_tokens`, and each step feeds tokens between the two.
    This covers chunked prefill, decoding, and recomputation after a preemption. A launched step leaves `UNSEEN` at the
    end of the answer until its token arrives.

    Each policy keeps its own facts of a sequence (`Siblings`, `Reuse`, `Speculation`, `WaitingQueue`), and drops them
    when the scheduler finishes it.
    """

    request: AddRequest  # `eos_token_ids` is set
    max_tokens: int = 16  # most tokens of the answer, at most as many as the context holds
    arrival: int = 0  # order of arrival
    seed: int = 0
    grammar: Grammar | None = field(default=None, repr=False)  # constrains the answer
    output_token_ids: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0  # computed tokens that the slot's ring holds and its state does not (`RingRule`)
    state_slot: int | None = None
    block_table: array[int] = field(default_factory=lambda: array("i"))  # a new array after each release of its blocks
    prompt_token_ids: list[int] = field(init=False, repr=False)
    stop_ids: frozenset[int] = field(init=False)  # tokens that end the answer
    max_fed: int = field(init=False)  # most tokens that are fed: all but the last one of a full answer

    def __post_init__(self) -> None:
        params = self.request.sampling_params
        eos = () if params.ignore_eos else self.request.eos_token_ids or ()
        self.prompt_token_ids = self.request.prompt_token_ids.tolist()
        self.stop_ids = frozenset(params.stop_token_ids).union(eos)
        self.max_fed = len(self.prompt_token_ids) + max(self.max_tokens - 1, 0)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def priority(self) -> int:
        """A sequence with a lower priority value runs earlier."""
        return self.request.priority

    @property
    def sampling_params(self) -> SamplingParams:
        return self.request.sampling_params

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """The number of tokens still to feed. The last token of a full answer is never fed."""
        num_tokens = len(self.prompt_token_ids) + len(self.output_token_ids)
        return (num_tokens if num_tokens < self.max_fed else self.max_fed) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the sequence is one token behind and has computed tokens. A one-token prompt has none: it is a
        prefill."""
        return self.num_computed_tokens > 0 and self.num_uncomputed_tokens == 1

    @property
    def is_ready(self) -> bool:
        """Whether the sequence may start: its grammar, if it has one, is compiled."""
        return self.grammar is None or self.grammar.is_ready

    @property
    def waits_for_its_token(self) -> bool:
        """Whether the next step must wait for the last token: the sequence's grammar has to see it first."""
        return self.grammar is not None and self.ends_in_unseen

    @property
    def ends_in_unseen(self) -> bool:
        return bool(self.output_token_ids) and self.output_token_ids[-1] == UNSEEN

    @property
    def is_at_last_prompt_token(self) -> bool:
        return self.num_computed_tokens == len(self.prompt_token_ids) - 1

    @property
    def order(self) -> tuple[int, int]:
        """The sort key of sequences: by priority, then by arrival. The lowest runs first."""
        return (self.request.priority, self.arrival)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens start .. end - 1 of prompt and answer."""
        split = len(self.prompt_token_ids)
        if end <= split:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:split] + self.output_token_ids[max(start - split, 0) : end - split]

    def known_tokens(self, end: int) -> np.ndarray:
        """The first `end` tokens of prompt and answer, [end] int32."""
        prompt = self.request.prompt_token_ids.numpy
        if end <= len(prompt):
            return prompt[:end]
        answer = np.array(self.output_token_ids[: end - len(prompt)], dtype=np.int32)
        return np.concatenate([prompt, answer])

    def finish_reason(self, index: int) -> FinishReason | None:
        """The reason to end the sequence with the index-th token of its answer; None = it goes on."""
        if self.output_token_ids[index] in self.stop_ids and index + 1 >= self.request.sampling_params.min_tokens:
            return "stop"
        return "length" if index + 1 >= self.max_tokens else None
