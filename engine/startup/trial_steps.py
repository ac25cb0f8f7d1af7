"""Steps that belong to no request. The start runs them to compile the kernels of serving and to measure its memory."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from ..execution.graph_shapes import doubling
from ..memory.operations import Fold, Operation, Restore, Save, StepSave
from ..messages import AddRequest
from ..sampling_params import MAX_LOGPROBS, SamplingParams
from ..scheduling.step import ScheduledBatch
from ..sequence import Sequence
from ..text.token_ids import TokenIds

# Uses every option that costs the sampler memory.
DEMANDING = SamplingParams(
    temperature=1.0,
    top_p=0.9,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={0: 1.0},
    logprobs=MAX_LOGPROBS,
)
SCORED = SamplingParams(prompt_logprobs=MAX_LOGPROBS)
PLAIN = SamplingParams(temperature=1.0, top_p=0.9)  # for rows with drafts: penalties or log-probabilities forbid them
SCORED_TOKENS = 65  # of a prompt whose tokens are scored; scores are computed in parts of 64


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The bounds of a step. Each slot has an equal run of blocks. A row that needs more uses blocks of other slots too,
    because no trial step needs its keys and values."""

    num_slots: int
    num_blocks: int
    block_size: int
    max_len: int  # tokens of one sequence
    max_tokens: int  # tokens of one step
    max_drafts: int = 0  # of one row
    max_drafted: int = 0  # rows of a step with drafts

    @property
    def even_length(self) -> int:
        """Tokens per prompt in a step with a prompt in every slot."""
        return max(1, min(self.max_len, self.max_tokens // self.num_slots))

    @property
    def longest_prompt(self) -> int:
        """Tokens of the largest chunk of one prompt."""
        return min(self.max_len, self.max_tokens, self.num_blocks * self.block_size)

    @property
    def most_drafted(self) -> int:
        """Rows of the largest step with drafts; 0 = no step can have drafts. The step needs a token for a draft, and
        the context one token before the draft and one after."""
        most = min(self.max_drafted, self.num_slots, self.max_tokens - 1)
        return most if self.max_drafts and self.max_len > 2 else 0


def smallest_steps(limits: StepLimits) -> Iterator[ScheduledBatch]:
    """One small step of each kind: a prompt of two tokens, a decode step, and two steps with drafts."""
    yield _prompts(limits, [min(2, limits.max_len)])
    if limits.max_len > 1:
        yield _decodes(limits, 1)
    if limits.most_drafted:
        yield _verifies(limits, 1)
        yield dataclasses.replace(_verifies(limits, 1), operations=[Fold(0, 1, 1)])  # after an accepted draft


def snapshot_step(limits: StepLimits, num_pending: int, every: int) -> ScheduledBatch:
    """A step with the operations of the prefix cache: a slot is saved and restored before a prompt's last token, and
    saved in the step after it.

    every: steps can save after multiples of this number of tokens (`CacheSpec.snapshot_every`). A context shorter than
    that has no save within the step.
    """
    folds = [Fold(0, num_pending, num_pending)] if num_pending else []
    operations: list[Operation] = [*folds, Save(0, 0), Restore(0, 0, [(0, 0)])]
    sequence = _sequence(limits, 0, min(every, limits.max_len))
    sequence.num_computed_tokens = sequence.num_tokens - 1
    saves = [StepSave(0, 1, 0)] if sequence.num_tokens == every else []
    return ScheduledBatch([sequence], [1], 1, operations, snapshots=saves)


def serving_steps(limits: StepLimits) -> Iterator[ScheduledBatch]:
    """Steps of every kind that serving runs, and the largest of each kind. After them no request waits for a compiler.

    - A prompt in every slot, together the largest step (many short rows), with a save to a padding snapshot.
    - One prompt of 1, 2, 3, 4, 5, 8, 9, ... tokens up to the largest chunk. A kernel changes its tile or its split of
      the work at a power of two, before it or after it.
    - A short prompt with prompt log-probabilities beside a long prompt (uneven rows).
    - Decode rows in half of the slots beside a prompt that takes the rest of the budget (mixed).
    - 1, 2, 4, ... decode rows up to every slot, with short block tables, and with one as wide as the context (split
      keys).
    - 1, 2, 4, ... verify rows with as many drafts as a step may have (logits of every token).
    """
    prompts = _prompts(limits, [limits.even_length] * min(limits.num_slots, limits.max_tokens))
    yield dataclasses.replace(prompts, snapshots=[StepSave(0, 1, -1)])
    for length in _both_sides(limits.longest_prompt):
        yield _prompts(limits, [length])
    short = min(SCORED_TOKENS, limits.longest_prompt)
    rest = min(limits.max_tokens - short, limits.longest_prompt)
    yield _prompts(limits, [short, rest] if limits.num_slots > 1 and rest else [short], scored=True)
    if limits.max_len == 1:
        return
    if limits.num_slots > 1:
        yield _mixed(limits, limits.num_slots // 2)
    for count in doubling(min(limits.num_slots, limits.max_tokens)):
        yield _decodes(limits, count)
        yield _decodes(limits, count, wide=True)
    for count in doubling(limits.most_drafted):
        yield _verifies(limits, count)


def _prompts(limits: StepLimits, lengths: list[int], *, scored: bool = False) -> ScheduledBatch:
    params = [SCORED if scored and slot == 0 else DEMANDING for slot in range(len(lengths))]
    rows = [_sequence(limits, slot, length, params[slot]) for slot, length in enumerate(lengths)]
    return ScheduledBatch(rows, lengths, len(rows))


def _decodes(limits: StepLimits, count: int, *, wide: bool = False) -> ScheduledBatch:
    rows = [_decoding(limits, slot) for slot in range(count)]
    if wide:
        rows[0].block_table.extend([0] * (-(-limits.max_len // limits.block_size) - len(rows[0].block_table)))
    return ScheduledBatch(rows, [1] * count, 0)


def _mixed(limits: StepLimits, num_decodes: int) -> ScheduledBatch:
    num_decodes = min(num_decodes, limits.max_tokens - 1)
    length = min(limits.max_tokens - num_decodes, limits.longest_prompt)
    rows = [_sequence(limits, 0, length), *(_decoding(limits, slot) for slot in range(1, num_decodes + 1))]
    return ScheduledBatch(rows, [length] + [1] * num_decodes, 1)


def _verifies(limits: StepLimits, count: int) -> ScheduledBatch:
    """A step of verify rows whose drafts share the budget as in the scheduler. The first of several rows has no drafts
    and demanding parameters, so the sampler processes the logits of all rows once more."""
    rows, drafts, left = [], [], limits.max_tokens - count
    for slot in range(count):
        is_demanding = count > 1 and slot == 0
        num_drafts = 0 if is_demanding else min(limits.max_drafts, limits.max_len - 2, left)
        rows.append(_decoding(limits, slot, num_drafts, DEMANDING if is_demanding else PLAIN))
        drafts.append([0] * num_drafts)
        left -= num_drafts
    return ScheduledBatch(rows, [1 + len(each) for each in drafts], count, drafts=drafts)


def _decoding(limits: StepLimits, slot: int, num_drafts: int = 0, params: SamplingParams = DEMANDING) -> Sequence:
    """A sequence whose prompt is computed, with its first answer token to feed, and with room for drafts after it."""
    length = min(limits.even_length, limits.max_len - 1 - num_drafts)
    sequence = _sequence(limits, slot, length, params, extra=1 + num_drafts)
    sequence.num_computed_tokens = length
    sequence.output_token_ids.append(0)
    return sequence


def _sequence(
    limits: StepLimits, slot: int, length: int, params: SamplingParams = DEMANDING, *, extra: int = 0
) -> Sequence:
    """A sequence with a prompt of `length` tokens in this slot, and blocks for `extra` more tokens."""
    first = slot * (limits.num_blocks // limits.num_slots)
    num_blocks = -(-(length + extra) // limits.block_size)
    return Sequence(
        AddRequest(request_id=f"trial-{slot}", prompt_token_ids=TokenIds([0] * length), sampling_params=params),
        block_table=array("i", [(first + i) % limits.num_blocks for i in range(num_blocks)]),
        state_slot=slot,
    )


def _both_sides(last: int) -> list[int]:
    """1, 2, 3, 4, 5, 8, 9, ... and `last`: each power of two, and each plus one."""
    powers = [1 << i for i in range(last.bit_length())]
    return sorted({min(length, last) for power in powers for length in (power, power + 1)} | {last})
