"""A sequence: its tokens and a few counters. Everything else follows from them."""

from __future__ import annotations

import enum
import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .outputs import FinishReason
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .scheduling.ngrams import NgramProposer
    from .text.grammar import Grammar

# The place of a token that the device has drawn, or is about to, and the host has not seen.
UNSEEN = -1


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """One request inside the engine.

    There are no phases: `num_computed_tokens` chases `num_tokens`, and every step feeds what lies between. Chunked
    prefill, decoding and recomputing after a preemption are all that. A launched step leaves `UNSEEN` at the end of the
    answer until its token arrives.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    max_tokens: int = 16  # of the answer, already cut to the context length
    priority: int = 0  # lower runs earlier
    arrival: int = 0  # order of arrival
    seed: int = 0
    deadline: float = math.inf  # on the monotonic clock: not started by then, it is refused
    output_token_ids: list[int] = field(default_factory=list)
    num_scored_tokens: int = 0  # of the prompt, whose log-probabilities have been handed over
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))
    num_sent_blocks: int = 0  # of these, so many are in the slot's row of `BlockTables`
    state_slot: int | None = None
    num_pending_tokens: int = 0  # computed tokens that the slot's ring holds and its state does not (`replay`)
    arrived_at: float = 0.0  # `time.perf_counter()` when it came to the engine
    queue_seconds: float | None = None  # from then to its first step; None while it waits for that
    is_counted: bool = False  # the sampler has counted the tokens in this slot (penalties)
    grammar: Grammar | None = field(default=None, repr=False)  # what the answer may be
    num_siblings: int = 0  # sequences that are to copy what this one has computed before its prompt's last token
    siblings: list[Sequence] = field(default_factory=list, repr=False)  # those of them that are here
    leader: Sequence | None = field(default=None, repr=False)  # whose sibling this is, until they part
    may_draft: bool = False  # it asks for nothing but tokens, so that drafts can be checked by what is drawn
    proposer: NgramProposer | None = field(default=None, repr=False)  # of its drafts, once there may be some
    drafts: list[int] = field(default_factory=list)  # behind its last token in the step that is under way
    is_verifying: bool = False  # a step is under way that tells which of its drafts, perhaps none, are right
    uses_cache: bool = False  # it may begin with what the prefix cache holds, and leaves its own there
    cache_salt: str | None = None  # it shares with those of the same salt only
    session_id: str | None = None  # under which its end is to be found, to be saved to a file
    num_cached_tokens: int | None = None  # that it began with; None until it is first admitted
    stops: list[int] = field(default_factory=list)  # increasing; after so many tokens of the prompt it is saved
    wanted_stops: set[int] = field(default_factory=set)  # where it parts from others, known before it starts
    waits_for: Sequence | None = field(default=None, repr=False)  # whose snapshot it waits for, before it starts
    awaited_stop: int = 0  # the stop of that one at which the snapshot is made
    num_waits: int = 0  # sequences it has waited for
    num_passed: int = 0  # times that a later sequence, with less to compute, was admitted before it
    was_preempted: bool = False
    _prompt: np.ndarray | None = field(default=None, repr=False)
    bias: tuple[np.ndarray, np.ndarray] | None = field(init=False, repr=False)  # token ids int64, logit bias float32
    stop_ids: frozenset[int] = field(init=False)  # tokens that end the answer
    max_fed: int = field(init=False)  # tokens that are fed to the model before the last one of the answer is drawn

    def __post_init__(self) -> None:
        params = self.sampling_params
        self.max_fed = len(self.prompt_token_ids) + max(self.max_tokens - 1, 0)
        self.bias = None
        if params.logit_bias:
            size, values = len(params.logit_bias), params.logit_bias.values()
            self.bias = np.fromiter(params.logit_bias, np.int64, size), np.fromiter(values, np.float32, size)
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)

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
        """Tokens still to feed. The last one of the answer never is."""
        num_tokens = len(self.prompt_token_ids) + len(self.output_token_ids)
        return (num_tokens if num_tokens < self.max_fed else self.max_fed) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """One token behind, with a past. A one-token prompt has no past: it is a prefill."""
        return self.num_computed_tokens > 0 and self.num_uncomputed_tokens == 1

    @property
    def is_ready(self) -> bool:
        """Whether it may start: its grammar, if it has one, is compiled."""
        return self.grammar is None or self.grammar.is_ready

    @property
    def waits_for_its_token(self) -> bool:
        """What may come next depends on a token that the host has not seen."""
        return self.grammar is not None and self.ends_in_unseen

    @property
    def ends_in_unseen(self) -> bool:
        return bool(self.output_token_ids) and self.output_token_ids[-1] == UNSEEN

    @property
    def is_at_last_prompt_token(self) -> bool:
        return self.num_computed_tokens == len(self.prompt_token_ids) - 1

    @property
    def order(self) -> tuple[int, int]:
        """Who runs first: by priority, then by arrival."""
        return (self.priority, self.arrival)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens start up to end of prompt and answer together."""
        split = len(self.prompt_token_ids)
        if end <= split:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:split] + self.output_token_ids[max(start - split, 0) : end - split]

    def known_tokens(self, end: int) -> np.ndarray:
        """[end] int32, the first tokens of prompt and answer."""
        if self._prompt is None:
            self._prompt = np.array(self.prompt_token_ids, dtype=np.int32)
        if end <= len(self._prompt):
            return self._prompt[:end]
        answer = np.array(self.output_token_ids[: end - len(self._prompt)], dtype=np.int32)
        return np.concatenate([self._prompt, answer])

    def finish_reason(self, index: int) -> FinishReason | None:
        """Why the sequence ends with the index-th token of its answer, or None to go on."""
        if self.output_token_ids[index] in self.stop_ids and index + 1 >= self.sampling_params.min_tokens:
            return "stop"
        return "length" if index + 1 >= self.max_tokens else None
