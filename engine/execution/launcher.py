"""Launches a scheduled batch: the step that computes it, paired with the sequences that get its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..outputs import TokenLogprobs
from ..scheduling.step import ScheduledBatch
from ..sequence import Sequence
from .block_tables import SentBlocks
from .composer import StepComposer
from .decode_rows import TokenSink
from .padding import GraphInputs
from .runner import ModelRunner
from .sampler import Sampled
from .staging import StagedTokens


@dataclass(slots=True)
class LaunchedStep:
    """A step that was launched, and the receivers of its tokens (`Receivers`)."""

    sequences: list[Sequence]  # of each token, perhaps none; with drafts a sequence comes once for each of its tokens
    indices: list[int]  # of each token in its sequence's answer
    sampled: Sampled | StagedTokens
    prompt_logprobs: dict[Sequence, list[TokenLogprobs]]
    sink: TokenSink | None = None
    drafts: list[tuple[Sequence, list[int]]] | None = None  # each row's drafts, in a step that has drafts
    num_finished: int = 0  # `ScheduledBatch.num_finished`: while the scheduler's count equals it, `sink` is valid

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Wait for the step; returns the token (-1 = bad logits) and the log-probabilities of each draw. Waits for a
        step without draws too, or the host would launch all chunks of a long prompt at once."""
        return self.sampled.wait()


class Launcher:
    """Composes a batch's input and runs it. Rank 0 has a composer and a runner; other ranks need a runner alone."""

    def __init__(self, runner: ModelRunner) -> None:
        pools, served = runner.pools, runner.served
        self.runner = runner
        self.composer = StepComposer(
            SentBlocks(pools.tables.table.shape[1]),
            GraphInputs(() if runner.graphs is None else runner.graphs.shapes),
            block_size=pools.block_size,
            vocab_size=served.spec.vocab_size,
            ring=served.ring,
        )

    def launch(self, scheduled: ScheduledBatch) -> LaunchedStep:
        """Start computing the scheduled tokens, and drawing tokens for the rows that are complete. On CUDA the host
        waits for the device only if a prompt's log-probabilities are wanted."""
        drafts = list(zip(scheduled.sequences, scheduled.drafts, strict=True)) if scheduled.drafts else None
        step, (sequences, indices, sink) = self.composer.compose(scheduled)
        sampled, scores = self.runner.run(step)
        found = {scheduled.sequences[row]: entries for row, entries in scores.items()}
        return LaunchedStep(sequences, indices, sampled, found, sink, drafts, scheduled.num_finished)
