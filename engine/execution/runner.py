"""Runs one step: prepare the batch, forward, sample."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...models.forward_batch import ForwardBatch
from ..outputs import TokenLogprobs
from ..scheduling.step import ScheduledBatch
from ..sequence import Sequence
from .copier import Copier
from .decode_rows import Answers, DecodeRows
from .graph_shapes import SNAPSHOTS, GraphShape
from .graphs import Computed, StepGraphs, pad
from .pools import DevicePools
from .prompt_scores import score, wanted_scores
from .sampler import Draw, Sampled, SamplingBatch, send_home
from .served_model import ServedModel
from .staging import StagedTokens
from .step_input import BATCH_TENSORS, Arrays, Counts, batch_arrays, count_rows, make_batch, packed_size, upload


@dataclass(slots=True)
class LaunchedStep:
    """A step on its way. `sequences`: those that get a token, perhaps none; `indices`: which of their answers' it is;
    `answers`: a shorter way to put them there, as long as none of these sequences has finished. With drafts a sequence
    comes once for each token that was drawn for it."""

    sequences: list[Sequence]
    indices: list[int]
    sampled: Sampled | StagedTokens
    prompt_logprobs: dict[Sequence, list[TokenLogprobs]]
    answers: Answers | None = None
    drafts: list[tuple[Sequence, list[int]]] | None = None  # of a step with drafts, those of each of its rows
    num_finished: int = 0  # sequences that had when it was launched

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Token (-1: bad logits) and log-probabilities of each completing row, once the step is computed. A step that
        draws nothing is waited for too: nothing else keeps the host from launching a whole prompt at once."""
        return self.sampled.wait()


class ModelRunner:
    """Runs steps of a model on its pools, from graphs where these hold them.

    Whole once it exists: `engine.startup` loads the model, allocates the pools and captures the graphs.
    """

    def __init__(self, served: ServedModel, pools: DevicePools, graphs: StepGraphs | None = None) -> None:
        self.served = served
        self.pools = pools
        self.graphs = graphs
        self.model, self.device = served.model, served.device
        self.tables, self.sampler = pools.tables, pools.sampler
        fold = functools.partial(self.model.fold_pending, pools.caches)
        self.copier = Copier(pools.states, pools.snapshots, pools.kv, fold, self.device)
        self._decoding: DecodeRows | None = None  # the last step, where it was of plain decode rows from a graph

    @torch.inference_mode()
    def launch(self, scheduled: ScheduledBatch) -> LaunchedStep:
        """Start computing the scheduled tokens, which writes state and KV pools, and sampling where a row's tokens are
        complete. On CUDA nothing waits for the device, but for log-probabilities of a prompt."""
        if scheduled.operations:
            self.copier.make(scheduled.operations)
        self._decoding = self._decode_rows(scheduled)
        if self._decoding is not None:
            return self._decode(self._decoding)
        rows, indices = _drawn_rows(scheduled)
        drafts = [(s, s.drafts) for s in scheduled.sequences] if scheduled.num_drafted else None
        arrays = batch_arrays(scheduled, self.pools.block_size) | self.sampler.arrays(rows, indices)
        arrays |= self.tables.new_cells(scheduled.sequences)
        counts = count_rows(scheduled)
        if self.graphs is not None and not scheduled.wants_prompt_logprobs:
            shape = self.graphs.shape_for(counts)
            if shape is not None and len(scheduled.snapshots) <= SNAPSHOTS:
                sampled = self._replay(self.graphs, shape, scheduled, counts, arrays)
                return LaunchedStep(rows, indices, sampled, {}, drafts=drafts)
        sent = upload(arrays, self.device)
        self.tables.write(sent["cells"], sent["blocks"])
        batch = make_batch(sent, counts, self.tables.of(scheduled.sequences))
        hidden = self._forward(batch)
        if rows:
            logits = self.model.compute_logits(hidden[batch.logits_indices])
            sampled = self.sampler.sample(logits, SamplingBatch.of(sent))
        else:
            sampled = self.sampler.draw_nothing()
        scores = score(wanted_scores(scheduled), hidden, self.model.compute_logits)
        found = {scheduled.sequences[row]: entries for row, entries in scores.items()}
        return LaunchedStep(rows, indices, sampled, found, drafts=drafts)

    def _decode_rows(self, scheduled: ScheduledBatch) -> DecodeRows | None:
        """What a graph is to read for a step of plain decode rows alone; None for other steps."""
        graphs, rows, advance = self.graphs, self._decoding, scheduled.advance
        if rows is not None and advance is not None and advance.before is rows.sequences:
            rows.advance(advance)
            return rows
        if graphs is None or scheduled.num_prefills or graphs.shape_of_decodes(scheduled.num_decodes) is None:
            return None
        wanted = self.sampler.rows(scheduled.sequences)
        if not wanted.is_plain:
            return None
        sent = upload(self.tables.new_cells(scheduled.sequences), self.device)
        self.tables.write(sent["cells"], sent["blocks"])
        return DecodeRows(graphs, scheduled, wanted, self.pools.block_size, self.served.ring)

    def _decode(self, rows: DecodeRows) -> LaunchedStep:
        """Start a step from its graph, in as few calls as can be: the host does this for every token."""
        assert self.graphs is not None
        pool = self.graphs.staging[rows.shape]
        staging = pool.take()
        staging.array[:] = rows.packed
        computed = self.graphs.replay(rows.shape, staging.inputs, brings_cells=rows.brings_cells)
        staging.bring_home(computed.tokens)
        sampled = StagedTokens(pool, staging, len(rows.sequences))
        return LaunchedStep(rows.sequences, rows.indices, sampled, {}, rows.answers)

    def _replay(
        self, graphs: StepGraphs, shape: GraphShape, scheduled: ScheduledBatch, counts: Counts, arrays: Arrays
    ) -> Sampled:
        """A step from its graph, which draws the tokens too; rows that want more are drawn again."""
        graph_rows = _places_of_draws(scheduled, counts, shape)
        padded = pad(arrays, counts, shape, graph_rows)
        rest = {"cells": arrays["cells"], "blocks": arrays["blocks"], "graph_rows": graph_rows}
        if not self.sampler.is_plain:
            rest |= {name: array for name, array in arrays.items() if name not in BATCH_TENSORS}
        sent = upload({f"padded_{name}": array for name, array in padded.items()} | rest, self.device)
        self.tables.write(sent["cells"], sent["blocks"])
        computed = graphs.replay(shape, sent.buffer[: packed_size(padded)])
        if not len(graph_rows):
            return self.sampler.draw_nothing()
        rows = sent["graph_rows"] if shape.num_prefills else slice(len(graph_rows))
        if self.sampler.is_plain:
            return send_home(computed.tokens[rows])
        return self.sampler.sample(computed.logits[rows], SamplingBatch.of(sent))

    def _forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, d]. Tokens that the host has not seen are those last drawn for their slots."""
        if batch.num_decodes:
            ids = batch.input_ids[batch.num_prefill_tokens :]
            last = self.sampler.last_tokens[batch.state_indices[batch.num_prefills :]]
            ids.copy_(torch.where(ids < 0, last, ids))
        return self.model(batch, self.pools.caches)

    def compute(self, batch: ForwardBatch, draw: Draw) -> Computed:
        """A step as its graph is to hold it."""
        hidden = self._forward(batch)
        logits = self.model.compute_logits(hidden[batch.logits_indices] if batch.num_prefills else hidden)
        if batch.num_drafted:  # the host sees these tokens before anything follows them
            return Computed(logits, self.served.kernels.sample(logits, *draw))
        return Computed(logits, self.sampler.draw(logits, draw, batch.state_indices))


def _drawn_rows(scheduled: ScheduledBatch) -> tuple[list[Sequence], list[int]]:
    """A row for each token that is drawn: whose it is, and which of its answer's."""
    if not scheduled.num_drafted:
        rows = [scheduled.sequences[row] for row in scheduled.completing_rows]
        return rows, [len(sequence.output_token_ids) for sequence in rows]
    rows = [s for s in scheduled.sequences for _ in range(1 + len(s.drafts))]
    return rows, [s.num_output_tokens + i for s in scheduled.sequences for i in range(1 + len(s.drafts))]


def _places_of_draws(scheduled: ScheduledBatch, counts: Counts, shape: GraphShape) -> np.ndarray:
    """Which of a graph's draws [N] int64 are the step's."""
    if counts.num_drafted:
        return np.arange(counts.num_drafted_tokens)
    rows = np.array(scheduled.completing_rows, dtype=np.int64)
    rows[rows >= counts.num_prefills] += shape.num_prefills - counts.num_prefills
    return rows
