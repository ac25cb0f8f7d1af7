"""Runs steps: the model's forward pass, and drawing tokens. Knows slots, blocks and rows; no sequence, no schedule."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.forward_batch import ForwardBatch
from ..outputs import TokenLogprobs
from .arrays import upload
from .copier import Copier
from .graphs import StepGraphs, StepResult
from .pools import DevicePools
from .prompt_scores import score
from .sampler import Sampled, SamplingBatch, SamplingInputs, send_home
from .served_model import ServedModel
from .staging import StagedTokens
from .step_input import StepInput, make_batch


class RunningStep(NamedTuple):
    """The tokens of a step on their way to the host, and scores of its prompts by row."""

    sampled: Sampled | StagedTokens
    scores: dict[int, list[TokenLogprobs]]


class ModelRunner:
    """Runs steps of a model on its pools; a step that a graph holds runs from the graph.

    Complete when constructed: `engine.startup` loads the model, allocates the pools and captures the graphs.
    """

    def __init__(self, served: ServedModel, pools: DevicePools, graphs: StepGraphs | None = None) -> None:
        self.served = served
        self.pools = pools
        self.graphs = graphs
        self.model, self.device = served.model, served.device
        self.tables, self.sampler = pools.tables, pools.sampler
        fold = functools.partial(self.model.fold_pending, pools.caches)
        self.copier = Copier(pools.states, pools.snapshots, pools.kv, fold, self.device)

    @torch.inference_mode()
    def run(self, step: StepInput) -> RunningStep:
        """Start computing a step, which writes to the pools, and drawing its tokens. On CUDA the host waits for the
        device only if a prompt's log-probabilities are wanted."""
        if step.operations:
            self.copier.make(step.operations)
        if step.shape is not None:
            return RunningStep(self._decode(step) if step.is_decode else self._replay(step), {})
        assert step.counts is not None and step.num_top is not None
        sent = upload(step.arrays, self.device)
        self.tables.write(sent["cells"], sent["blocks"])
        batch = make_batch(sent, step.counts, self.tables.view(step.num_columns))
        hidden = self._forward(batch)
        if step.num_draws:
            logits = self.served.compute_logits(hidden[batch.logits_indices])
            sampled = self.sampler.sample(logits, SamplingBatch.of(sent, step.num_top))
        else:
            sampled = self.sampler.draw_nothing()
        return RunningStep(sampled, score(step.scores, hidden, self.served.compute_logits))

    def _decode(self, step: StepInput) -> StagedTokens:
        """Run a step of plain decode rows from its graph. Few calls: the host makes them for every token."""
        assert self.graphs is not None and step.shape is not None and step.padded is not None
        if step.arrays:
            sent = upload(step.arrays, self.device)
            self.tables.write(sent["cells"], sent["blocks"])
        pool = self.graphs.staging[step.shape]
        staging = pool.take()
        staging.array[:] = step.padded
        result = self.graphs.replay(step.shape, staging.inputs, brings_cells=step.brings_cells)
        staging.bring_home(result.tokens)
        return StagedTokens(pool, staging, step.num_draws)

    def _replay(self, step: StepInput) -> Sampled:
        """Run any other step from its graph, which draws tokens too. A step that is not plain is drawn again."""
        assert self.graphs is not None and step.shape is not None and step.padded is not None
        sent = upload({"padded": step.padded} | step.arrays, self.device)
        self.tables.write(sent["cells"], sent["blocks"])
        result = self.graphs.replay(step.shape, sent["padded"])
        if not step.num_draws:
            return self.sampler.draw_nothing()
        rows = sent["places"] if step.shape.num_prefills else slice(step.num_draws)
        if step.is_plain:
            return send_home(result.tokens[rows])
        assert step.num_top is not None
        return self.sampler.sample(result.logits[rows], SamplingBatch.of(sent, step.num_top))

    def _forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, d]. An input id below 0 is replaced, in place, by the last token drawn for its slot."""
        if batch.num_decodes:
            ids = batch.input_ids[batch.num_prefill_tokens :]
            last = self.sampler.last_tokens[batch.state_indices[batch.num_prefills :]]
            ids.copy_(torch.where(ids < 0, last, ids))
        return self.model(batch, self.pools.caches)

    def compute(self, batch: ForwardBatch, inputs: SamplingInputs) -> StepResult:
        """Logits and tokens of a step, without log-probabilities and adjusted logits; the graphs capture this call."""
        hidden = self._forward(batch)
        logits = self.served.compute_logits(hidden[batch.logits_indices] if batch.num_prefills else hidden)
        if (
            batch.num_drafted
        ):  # `last_tokens` stays: the host sees a verify row's tokens before it launches the next step
            return StepResult(logits, self.served.kernels.sample(logits, *inputs))
        return StepResult(logits, self.sampler.draw(logits, inputs, batch.state_indices))
