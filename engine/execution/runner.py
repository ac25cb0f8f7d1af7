"""Runs one step: prepare the batch, forward, sample. Owns the model and the pools."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...configs.schema import EngineConfig
from ...kernels import load as load_kernels
from ...kernels import use_device
from ...models.decoder import Decoder
from ...models.families.registry import names_of, read_config
from ...models.forward_batch import ForwardBatch
from ...models.layers.build import Build
from ...models.loading.checkpoint import resolve
from ...models.loading.weights import fill_with_noise, load_weights
from ...models.mixers.cache import slot_bytes, token_bytes
from ...models.mixers.lightning_backends import LINEAR_BACKENDS, LinearAttentionBackend
from ..errors import ConfigError
from ..memory.groups import snapshot_bytes
from ..memory.pools import DTypes, KVPool, SnapshotPool, StatePool, layer_caches
from ..memory.ring import RingRule
from ..outputs import TokenLogprobs
from ..scheduling.step import ScheduledBatch
from ..sequence import Sequence
from ..startup.device import pick_device, pick_dtype, pick_kernels, spare_cores
from ..startup.measuring import bound_allocator, free_memory, refuse_out_of_memory, size_pools
from ..startup.trial_steps import StepLimits, smallest_steps, snapshot_step
from .block_tables import BlockTables
from .copier import Copier
from .decode_rows import Answers, DecodeRows
from .graphs import SNAPSHOTS, Computed, GraphShape, StepGraphs, pad, shapes_for
from .prompt_scores import score, wanted_scores
from .sampler import Draw, Sampled, Sampler, SamplingBatch, send_home
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
    """The model on its device, which becomes the current one of the thread that makes the runner. Another thread calls
    `use_device` before it launches a step. `config` is read once."""

    def __init__(self, config: EngineConfig, *, progress: bool = True) -> None:
        self.folder = resolve(config.model, config.revision)
        self.model_config = read_config(self.folder)
        self.device = pick_device(config.device)
        use_device(self.device)
        self.dtype = pick_dtype(config.dtype, self.model_config, self.device)
        self.dtypes = DTypes(getattr(torch, config.state_dtype), self.dtype)
        self.snapshot_dtypes = DTypes(getattr(torch, config.saved_state_dtype), self.dtype)
        self.kernel_name = pick_kernels(config.kernels, self.device)
        self.block_size = config.block_size
        torch.set_num_threads(config.num_threads or spare_cores())
        self.kernels = load_kernels(self.kernel_name)
        self.max_drafts = config.speculative_tokens
        linear_backend = LINEAR_BACKENDS[config.linear_backend](self.kernels, speculative=self.max_drafts > 0)
        self.linear_backend = linear_backend.name
        self.ring = RingRule(linear_backend.ring_size, linear_backend.replays)
        if self.max_drafts > self.ring.most_drafts:
            raise ConfigError(
                f"speculative_tokens = {self.max_drafts}: linear_backend {linear_backend.name} keeps "
                f"{self.ring.capacity} tokens beside a state, and drafts need {self.max_drafts + 2}; set "
                "speculative_tokens to 0 or take another linear_backend"
            )
        with refuse_out_of_memory("the weights", "take a device with more memory, or a smaller dtype"):
            self.model = self._load(config, linear_backend, progress=progress)
        self.graphs: StepGraphs | None = None
        self._decoding: DecodeRows | None = None  # the last step, where it was of plain decode rows from a graph
        self.wants_graphs = config.cuda_graphs and self.device.type == "cuda" and self.kernel_name == "triton"
        self.plan, self.memory = size_pools(self, config)
        self.warm_up()
        if self.wants_graphs:
            self._keep_graphs(config, progress=progress)

    def _load(self, config: EngineConfig, linear_backend: LinearAttentionBackend, *, progress: bool) -> Decoder:
        model = Decoder(self.model_config, Build(self.kernels, self.device, self.dtype), linear_backend)
        if config.load_format == "dummy":
            fill_with_noise(model.parameters())
        else:
            names, ignored = names_of(model.spec), model.ignored_names()
            load_weights(self.folder, model.targets(), names, ignored=ignored, progress=progress)
        return model

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
        arrays = batch_arrays(scheduled, self.block_size) | self.sampler.arrays(rows, indices)
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
        return DecodeRows(graphs, scheduled, wanted, self.block_size, self.ring)

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
        return self.model(batch, self.caches)

    def _compute(self, batch: ForwardBatch, draw: Draw) -> Computed:
        """A step as its graph is to hold it."""
        hidden = self._forward(batch)
        logits = self.model.compute_logits(hidden[batch.logits_indices] if batch.num_prefills else hidden)
        if batch.num_drafted:  # the host sees these tokens before anything follows them
            return Computed(logits, self.kernels.sample(logits, *draw))
        return Computed(logits, self.sampler.draw(logits, draw, batch.state_indices))

    @torch.inference_mode()
    def capture(self, shapes: list[GraphShape], *, progress: bool = False) -> StepGraphs:
        """Graphs of steps of these shapes. Raises `ConfigError` when they do not fit."""
        most = max(max(shape.num_decodes, shape.num_verifies) for shape in shapes)
        remedy = "lower max_graph_rows or max_num_seqs, or set cuda_graphs to false"
        with refuse_out_of_memory(f"CUDA graphs of up to {most} rows", remedy):
            return StepGraphs(self._compute, shapes, self.tables, self.device, progress=progress)

    def _keep_graphs(self, config: EngineConfig, *, progress: bool) -> None:
        """Capture the graphs that serve, and account for what they really take."""
        shapes = shapes_for(config, self.plan.num_state_slots)
        before = free_memory(self.device)[0]
        self.graphs = self.capture(shapes, progress=progress)
        self.memory.graphs = before - free_memory(self.device)[0]
        if self.memory.unassigned < 0:
            self.plan.notes.append(
                f"CUDA graphs took more than measured: memory_fraction is exceeded by {-self.memory.unassigned:,} bytes"
            )

    def hold_share(self) -> None:
        """For a process that does nothing else: keep all of its memory on the device within the configured share."""
        if self.device.type == "cuda":
            bound_allocator(self.device, self.memory)

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def state_bytes_per_slot(self) -> int:
        return slot_bytes(self.model.caches, self.dtypes.sizes)

    @property
    def snapshot_bytes(self) -> int:
        return snapshot_bytes(self.model.caches, self.snapshot_dtypes.sizes)

    @property
    def kv_bytes_per_token(self) -> int:
        return token_bytes(self.model.caches, self.dtypes.sizes)

    def allocate(self, num_slots: int, num_blocks: int, max_model_len: int, num_snapshots: int = 0) -> None:
        """Make the device's pools, uninitialised, and the tables of the sampler and of blocks."""
        caches = self.model.caches
        self.states = StatePool(caches, num_slots, self.dtypes, device=self.device)
        self.snapshots = SnapshotPool(caches, num_snapshots, self.snapshot_dtypes, device=self.device)
        self.kv = KVPool(caches, num_blocks, self.block_size, self.dtypes, device=self.device)
        self.tables = BlockTables(num_slots, -(-max_model_len // self.block_size), self.device)
        self.caches = layer_caches(caches, self.states, self.snapshots, self.kv)
        self.sampler = Sampler(self.kernels, num_slots, self.model_config.vocab_size, self.device)
        self.copier = Copier(
            self.states, self.snapshots, self.kv, functools.partial(self.model.fold_pending, self.caches), self.device
        )

    def release(self) -> None:
        """Give back what `allocate` made."""
        del self.states, self.snapshots, self.kv, self.tables, self.caches, self.sampler, self.copier

    def warm_up(self) -> None:
        """The first steps on the real pools. Uses slot 0 and the first blocks, which are free: what it leaves there is
        what any former owner leaves. On CUDA all that serving meets is compiled by now: prefill by
        `dummy_steps.serving_steps`, which measured it, and decode by that or by the capture of its graphs."""
        plan = self.plan
        pools = (plan.num_state_slots, plan.num_kv_blocks, self.block_size, plan.max_model_len)
        limits = StepLimits(*pools, max_tokens=2, max_drafts=self.max_drafts, max_drafted=1)
        remedy = "lower memory_fraction or max_num_batched_tokens"
        with refuse_out_of_memory("a first step beside the pools", remedy):
            for step in smallest_steps(limits):
                self.launch(step).wait()
            if plan.num_snapshots:
                self.launch(snapshot_step(limits, num_pending=min(1, self.ring.capacity))).wait()


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
