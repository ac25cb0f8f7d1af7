"""A scheduled batch on its way: the step that computes it, paired with the sequences that get its tokens."""

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
    """A step on its way. `sequences`: those that get a token, perhaps none; `indices`: its index in their answers;
    `sink`: a shorter way to put the tokens there, as long as none of these sequences has finished. With drafts a
    sequence comes once for each token that was drawn for it."""

    sequences: list[Sequence]
    indices: list[int]
    sampled: Sampled | StagedTokens
    prompt_logprobs: dict[Sequence, list[TokenLogprobs]]
    sink: TokenSink | None = None
    drafts: list[tuple[Sequence, list[int]]] | None = None  # of a step with drafts, those of each of its rows
    num_finished: int = 0  # `ScheduledBatch.num_finished`: as long as it stays, `sink` serves

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Token (-1: bad logits) and log-probabilities of each completing row, once the step is computed. A step that
        draws nothing is waited for too: nothing else keeps the host from launching a whole prompt at once."""
        return self.sampled.wait()


class Launcher:
    """The composer's and the runner's meeting place: the first rank has both, every other one a runner alone."""

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
        """Start computing the scheduled tokens, and sampling where a row's tokens are complete. On CUDA nothing waits
        for the device, but for log-probabilities of a prompt."""
        drafts = list(zip(scheduled.sequences, scheduled.drafts, strict=True)) if scheduled.drafts else None
        step, (sequences, indices, sink) = self.composer.compose(scheduled)
        sampled, scores = self.runner.run(step)
        found = {scheduled.sequences[row]: entries for row, entries in scores.items()}
        return LaunchedStep(sequences, indices, sampled, found, sink, drafts, scheduled.num_finished)
