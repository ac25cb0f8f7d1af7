"""Puts the drawn tokens of a step into sequences and outputs, and finishes the sequences that end."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from .execution.launcher import LaunchedStep
from .messages import EngineStats
from .outputs import StepOutput, TokenLogprobs
from .scheduling.scheduler import Scheduler
from .scheduling.speculation import num_kept
from .sequence import Sequence, Status

logger = logging.getLogger("leyden.engine")

SCORED_TOKENS = 1024  # most scored prompt tokens of one output: 200 KB of a message, with twenty alternatives each
BAD_LOGITS = "the model gave NaN or infinite logits for this request"
NOTHING_ALLOWED = "the grammar of this request allows no token here, or the model gave NaN or infinite logits"


@dataclass(slots=True)
class _Beginning:
    """Facts of a request that are reported before its answer, or with its first token."""

    arrived_at: float  # on the clock of `time.perf_counter`
    queue_seconds: float | None = None  # from arrival to the first step; waits after a preemption do not count
    num_scored: int = 0  # prompt tokens whose log-probabilities have been reported


class Collector:
    """Collects the tokens of steps. Counts up `stats` in place."""

    def __init__(self, scheduler: Scheduler, stats: EngineStats) -> None:
        self._scheduler = scheduler
        self._stats = stats
        self._beginnings: dict[Sequence, _Beginning] = {}  # of sequences without a first token

    def add(self, sequence: Sequence, now: float) -> None:
        """Note the arrival of a sequence. now: on the clock of `time.perf_counter`."""
        self._beginnings[sequence] = _Beginning(now)

    def start(self, sequences: list[Sequence], now: float) -> None:
        """Note that the sequences leave the queue, some not for the first time."""
        for sequence in sequences:
            beginning = self._beginnings.get(sequence)
            if beginning is not None and beginning.queue_seconds is None:
                beginning.queue_seconds = now - beginning.arrived_at

    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence that was aborted or refused."""
        self._beginnings.pop(sequence, None)

    def check_integrity(self) -> None:
        """Only sequences of the scheduler are kept. Raises AssertionError."""
        assert all(sequence.request_id in self._scheduler for sequence in self._beginnings)

    def collect(self, step: LaunchedStep, tokens: list[int], logprobs: list[TokenLogprobs | None]) -> list[StepOutput]:
        """Put the step's tokens into its sequences, and finish the sequences that end. Returns an output per sequence.
        Sequences that ended or were aborted while the step ran get no token and no output."""
        outputs = None
        if step.drafts is not None:
            outputs = self._collect_verified(step.drafts, tokens, logprobs)
        elif step.sink is not None and step.num_finished == self._scheduler.num_finished:
            outputs = step.sink.take(step.indices, tokens)
        if outputs is None:
            outputs = self._collect_each(step, tokens, logprobs)
        self._stats.generation_tokens_total += sum([len(output.token_ids) for output in outputs])
        return outputs

    def prompt_scores(self, step: LaunchedStep) -> list[StepOutput]:
        """Return the scores of prompt tokens that a step has computed, at most `SCORED_TOKENS` per output. Must run
        before `Scheduler.update` counts the step.

        A prompt's first score is None, for its first token. A prompt that starts again after a preemption returns no
        score twice.
        """
        outputs = []
        for sequence, entries in step.prompt_logprobs.items():
            start, beginning = sequence.num_computed_tokens, self._beginnings[sequence]
            scores: list[TokenLogprobs | None] = [*entries] if start else [None, *entries]
            new = scores[beginning.num_scored - (start + 1 if start else 0) :]
            beginning.num_scored += len(new)
            outputs += [
                StepOutput(request_id=sequence.request_id, prompt_logprobs=new[i : i + SCORED_TOKENS])
                for i in range(0, len(new), SCORED_TOKENS)
            ]
        return outputs

    def _collect_verified(
        self, drafts: list[tuple[Sequence, list[int]]], tokens: list[int], logprobs: list[TokenLogprobs | None]
    ) -> list[StepOutput]:
        """`collect` for a step with drafts: each sequence gets its kept tokens (`num_kept`)."""
        outputs, at = [], 0
        for sequence, guessed in drafts:
            start, at = at, at + len(guessed) + 1
            if sequence.status is Status.FINISHED:
                continue
            self._scheduler.verified(sequence)
            kept = num_kept(guessed, tokens[start:at])
            outputs.append(self._take_kept(sequence, tokens[start : start + kept], logprobs[start]))
            self._scheduler.speculation.observe(sequence, len(guessed), kept - 1)
        return outputs

    def _take_kept(self, sequence: Sequence, tokens: list[int], logprobs: TokenLogprobs | None) -> StepOutput:
        """Append the kept tokens to the sequence until it ends. logprobs: of the first token. A sequence with logprobs
        has no drafts, so no other token needs them."""
        whole: StepOutput | None = None
        for token_id in tokens:
            self._scheduler.keep_verified(sequence)
            output = self._advance(sequence, sequence.num_output_tokens - 1, token_id, logprobs)
            if whole is None:
                whole = output
            else:
                whole.extend(output)
            if output.finish_reason is not None:
                break
        assert whole is not None
        return whole

    def _collect_each(
        self, step: LaunchedStep, tokens: list[int], logprobs: list[TokenLogprobs | None]
    ) -> list[StepOutput]:
        """`collect` by visiting every sequence (the slow path)."""
        finished = Status.FINISHED
        outputs = []
        for sequence, index, token_id, entry in zip(step.sequences, step.indices, tokens, logprobs, strict=True):
            if sequence.status is finished:
                continue
            ends = index + 1 >= sequence.max_tokens or token_id in sequence.stop_ids
            if token_id < 0 or ends or index == 0 or entry is not None or sequence.grammar is not None:
                outputs.append(self._advance(sequence, index, token_id, entry))
            else:  # nearly always
                sequence.output_token_ids[index] = token_id
                outputs.append(StepOutput(request_id=sequence.request.request_id, token_ids=[token_id]))
        return outputs

    def _advance(self, sequence: Sequence, index: int, token_id: int, logprobs: TokenLogprobs | None) -> StepOutput:
        """Put the index-th token into the sequence's answer, and finish the sequence if it ends. Returns its output."""
        grammar = sequence.grammar
        if token_id < 0:
            output = _failure(sequence, BAD_LOGITS if grammar is None else NOTHING_ALLOWED)
        elif grammar is not None and sequence.max_tokens and not grammar.accept(token_id):
            output = _failure(sequence, NOTHING_ALLOWED)
        elif sequence.max_tokens == 0:
            output = StepOutput(request_id=sequence.request_id, finish_reason="length")
        else:
            sequence.output_token_ids[index] = token_id
            reason = sequence.finish_reason(index)
            is_over = grammar is not None and grammar.is_over
            if is_over:
                reason = "stop"
            output = StepOutput(request_id=sequence.request_id, token_ids=[token_id], finish_reason=reason)
            if logprobs is not None:
                output.logprobs = [logprobs]
            if reason == "stop" and not (is_over and token_id not in sequence.stop_ids):
                output.stop_token_id = token_id
        if index == 0:
            self._stats.prompt_tokens_total += sequence.num_prompt_tokens
            output.queue_seconds = self._beginnings.pop(sequence).queue_seconds
            output.num_cached_tokens = self._scheduler.reuse.num_cached(sequence)
        if output.finish_reason is not None:
            del sequence.output_token_ids[index + 1 :]  # a token of one step too many is under way
            if output.is_failure:
                self._scheduler.finish(sequence)
            else:
                self._scheduler.complete(sequence)
        return output


def _failure(sequence: Sequence, message: str) -> StepOutput:
    logger.error("request %s: %s", sequence.request_id, message)
    return StepOutput(request_id=sequence.request_id, finish_reason="error", error_code="internal", error=message)
