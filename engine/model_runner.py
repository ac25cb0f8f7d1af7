"""Runs one step: prepare the batch, forward, sample. Owns the model and the pools."""

from __future__ import annotations

import importlib.util
import os
from array import array
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..configs.schema import EngineConfig
from ..kernels import KernelName, default_for
from ..kernels import load as load_kernels
from ..models.backends import LINEAR_BACKENDS
from ..models.checkpoint import read_config, resolve
from ..models.config import LightningSpec, ModelConfig
from ..models.forward_batch import ForwardBatch
from ..models.minimax import Cache
from ..models.registry import FAMILIES
from ..models.weights import fill_with_noise, load_weights
from .batch import Arrays, batch_arrays, count_rows, make_batch, upload
from .cuda_graph import Decoded, DecodeGraphs, graph_sizes, pad_rows
from .errors import ConfigError
from .memory import MemoryPlan, plan_memory
from .outputs import TokenLogprobs
from .pools import KVPool, StatePool
from .sampler import Draw, Sampled, Sampler, SamplingBatch, send_home, token_logprobs
from .sampling_params import SamplingParams
from .scheduler import ScheduledBatch
from .sequence import Sequence

PROMPT_LOGPROB_ROWS = 64  # rows of vocabulary-wide float32 that exist at once


@dataclass(slots=True)
class LaunchedStep:
    """A step on its way. `completing`: the rows that get a token, and which of their answer's it is."""

    completing: list[tuple[Sequence, int]]
    sampled: Sampled | None
    prompt_logprobs: dict[Sequence, list[TokenLogprobs]]

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Token (-1: bad logits) and log-probabilities of each completing row, once they are computed."""
        return self.sampled.wait() if self.sampled is not None else ([], [])


class ModelRunner:
    """The model on its device. `config` is read once; nothing is changed afterwards but the pools."""

    def __init__(self, config: EngineConfig, *, progress: bool = True) -> None:
        self.folder = resolve(config.model, config.revision)
        self.model_config = read_config(self.folder)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.model_config, self.device)
        self.state_dtype = getattr(torch, config.state_dtype)
        self.kernel_name = pick_kernels(config.kernels, self.device)
        self.block_size = config.block_size
        torch.set_num_threads(config.num_threads or _spare_cores())
        self.kernels = load_kernels(self.kernel_name)
        linear_backend = LINEAR_BACKENDS[config.linear_backend](self.kernels)
        self.ring_size = linear_backend.ring_size
        self.model = FAMILIES[self.model_config.architecture].module()(
            self.model_config,
            self.kernels,
            linear_backend,
            device=self.device,
            dtype=self.dtype,
        )
        if config.load_format == "dummy":
            fill_with_noise(self.model.parameters())
        else:
            load_weights(self.folder, self.model.targets(), ignored=self.model.ignored_names(), progress=progress)
        self.graphs: DecodeGraphs | None = None
        self.plan = self._size_pools(config)
        self.model.reserve_positions(self.plan.max_model_len)
        self.warm_up()
        if self._wants_graphs(config):
            sizes = graph_sizes(min(self.plan.num_state_slots, config.max_graph_rows))
            self.graphs = self._capture(sizes, self.plan.max_model_len, progress=progress)

    @torch.inference_mode()
    def launch(self, scheduled: ScheduledBatch) -> LaunchedStep:
        """Start computing the scheduled tokens, which writes state and KV pools, and sampling where a row's tokens are
        complete. On CUDA nothing waits for the device, but for log-probabilities of a prompt."""
        rows = [scheduled.sequences[row] for row in scheduled.completing_rows]
        completing = [(sequence, len(sequence.output_token_ids)) for sequence in rows]
        arrays = batch_arrays(scheduled, self.block_size) | self.sampler.arrays(rows)
        size = None
        if self.graphs is not None and scheduled.num_prefills == 0:
            size = self.graphs.size_for(len(rows))
        if self.graphs is not None and size is not None:
            return LaunchedStep(completing, self._replay(self.graphs, size, arrays), {})
        sent = upload(arrays, self.device)
        batch = make_batch(sent, count_rows(scheduled))
        hidden = self._forward(batch)
        sampled = None
        if rows:
            logits = self.model.compute_logits(hidden[batch.logits_indices])
            sampled = self.sampler.sample(logits, SamplingBatch.of(sent))
        return LaunchedStep(completing, sampled, self._prompt_logprobs(scheduled, hidden))

    def _replay(self, graphs: DecodeGraphs, size: int, arrays: Arrays) -> Sampled:
        """A decode step from its graph, which draws the tokens too; rows that want more are drawn again."""
        padded = pad_rows(arrays, size)
        is_plain = self.sampler.is_plain
        rest = ["block_table"] if is_plain else [name for name in arrays if name not in padded]
        sent = upload(padded | {name: arrays[name] for name in rest}, self.device)
        decoded = graphs.replay(size, sent)
        num_rows = len(arrays["slots"])
        if is_plain:
            return send_home(decoded.tokens[:num_rows])
        return self.sampler.sample(decoded.logits[:num_rows], SamplingBatch.of(sent))

    def _forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, d]. Tokens that the host has not seen are those last drawn for their slots."""
        if batch.num_decodes:
            ids = batch.input_ids[batch.num_prefill_tokens :]
            last = self.sampler.last_tokens[batch.state_indices[batch.num_prefills :]]
            ids.copy_(torch.where(ids < 0, last, ids))
        return self.model(batch, self.caches)

    def _decode(self, batch: ForwardBatch, draw: Draw) -> Decoded:
        """A step of decode rows alone, as its graph is to hold it."""
        logits = self.model.compute_logits(self._forward(batch))
        return Decoded(logits, self.sampler.draw(logits, draw, batch.state_indices))

    def _wants_graphs(self, config: EngineConfig) -> bool:
        return config.cuda_graphs and self.device.type == "cuda" and self.kernel_name == "triton"

    @torch.inference_mode()
    def _capture(self, sizes: list[int], max_model_len: int, *, progress: bool = False) -> DecodeGraphs:
        width = min(-(-max_model_len // self.block_size), self.kv.num_blocks)
        return DecodeGraphs(self._decode, sizes, width, self.device, progress=progress)

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def state_bytes_per_slot(self) -> int:
        state = self.model_config.state_bytes_per_sequence(self.state_dtype.itemsize)
        return state + self.model_config.ring_bytes_per_sequence(self.ring_size, self.dtype.itemsize)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.model_config.kv_bytes_per_token(self.dtype.itemsize)

    def _prompt_logprobs(self, scheduled: ScheduledBatch, hidden: Tensor) -> dict[Sequence, list[TokenLogprobs]]:
        """Log-probabilities of the prompt tokens that this step's hidden states predict, a few rows at a time."""
        found: dict[Sequence, list[TokenLogprobs]] = {}
        offset = 0
        for sequence, count in zip(scheduled.sequences, scheduled.num_scheduled_tokens, strict=True):
            num_top = sequence.sampling_params.prompt_logprobs
            if num_top is not None and sequence.num_output_tokens == 0:
                start = sequence.num_computed_tokens
                targets = sequence.prompt_token_ids[start + 1 : start + count + 1]
                rows = hidden[offset : offset + len(targets)]
                found[sequence] = self._score(rows, targets, num_top)
            offset += count
        return found

    def _score(self, hidden: Tensor, targets: list[int], num_top: int) -> list[TokenLogprobs]:
        entries: list[TokenLogprobs] = []
        for i in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            part = targets[i : i + PROMPT_LOGPROB_ROWS]
            logits = self.model.compute_logits(hidden[i : i + len(part)]).float()
            entries += token_logprobs(logits, torch.tensor(part, device=self.device), [num_top] * len(part))
        return entries

    def _size_pools(self, config: EngineConfig) -> MemoryPlan:
        """Measure what a largest step needs, split what is left, allocate the pools."""
        max_model_len = config.max_model_len or self.model_config.max_model_len
        if max_model_len > self.model_config.max_model_len:
            raise ConfigError(
                f"max_model_len ({max_model_len}) exceeds the checkpoint's context "
                f"({self.model_config.max_model_len}); lower it"
            )
        plan = plan_memory(
            self._free_bytes(config) - self.model.position_bytes(max_model_len),
            state_bytes_per_slot=self.state_bytes_per_slot + Sampler.bytes_per_slot(self.model_config.vocab_size),
            kv_bytes_per_token=self.kv_bytes_per_token,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            num_kv_blocks=config.num_kv_blocks,
        )
        self._allocate(plan.num_state_slots, plan.num_kv_blocks)
        return plan

    def _allocate(self, num_slots: int, num_blocks: int) -> None:
        config = self.model_config
        self.states = StatePool(
            config.linear_layers,
            num_slots,
            device=self.device,
            dtype=self.state_dtype,
            ring_size=self.ring_size,
            ring_dtype=self.dtype,
        )
        self.kv = KVPool(config.full_layers, num_blocks, self.block_size, device=self.device, dtype=self.dtype)
        self.caches = _caches_by_layer(config, self.states, self.kv)
        self.sampler = Sampler(self.kernels, num_slots, config.vocab_size, self.device)

    def _free_bytes(self, config: EngineConfig) -> int:
        """Bytes for the pools: a setting on a CPU; on CUDA the configured share less weights and the largest step."""
        if self.device.type != "cuda":
            return int(config.cpu_memory_gb * 1e9)
        peak = self._measure_largest_step(config)
        free, total = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device)
        return int(total * config.memory_fraction) - others - peak

    def _measure_largest_step(self, config: EngineConfig) -> int:
        """Peak bytes of one step of max_num_batched_tokens prompt tokens and as many sampled rows as may run."""
        tokens, max_len = config.max_num_batched_tokens, config.max_model_len or self.model_config.max_model_len
        rows = min(config.max_num_seqs, tokens)
        length = min(max_len, tokens // rows)
        blocks = -(-length // self.block_size)
        self._allocate(rows, rows * blocks)
        self.model.reserve_positions(length)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        dummies = [_dummy(i, length, list(range(i * blocks, (i + 1) * blocks))) for i in range(rows)]
        try:
            self.launch(ScheduledBatch(dummies, [length] * rows, rows)).wait()
            torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"a step of max_num_batched_tokens = {tokens} tokens does not fit on the device; "
                "lower it or max_num_seqs"
            ) from None
        pools = self.states.nbytes + self.kv.nbytes + self.sampler.nbytes
        peak = torch.cuda.max_memory_allocated(self.device) - pools
        if self._wants_graphs(config):
            peak += self._measure_graphs(graph_sizes(min(rows, config.max_graph_rows)), max_len)
        del self.states, self.kv, self.caches, self.sampler
        torch.cuda.empty_cache()
        return peak

    def _measure_graphs(self, sizes: list[int], max_model_len: int) -> int:
        """Bytes that graphs of these sizes will take: the largest shapes their memory, each adds its own nodes."""
        free = [self._reserve_free()]
        for part in (sizes[-1:], sizes[:1] + sizes[-1:]):
            graphs = self._capture(part, max_model_len)
            free.append(self._reserve_free())
            del graphs
            self._reserve_free()
        first, second = free[0] - free[1], free[0] - free[2]
        return max(first, second) + max(second - first, 0) * len(sizes)

    def _reserve_free(self) -> int:
        """Bytes free on the device, after giving back what the allocator only keeps."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def warm_up(self) -> None:
        """A prefill and a decode step, so that most of the compiling is done before the first request. Uses slot 0 and
        the first blocks, which are free: what it leaves there is what any former owner leaves."""
        num_blocks = -(-min(3, self.plan.max_model_len) // self.block_size)
        dummy = _dummy(0, min(2, self.plan.max_model_len), list(range(num_blocks)))
        self.launch(ScheduledBatch([dummy], [dummy.num_tokens], 1)).wait()
        if dummy.num_tokens < self.plan.max_model_len:
            dummy.num_computed_tokens = dummy.num_tokens
            dummy.output_token_ids.append(0)
            self.launch(ScheduledBatch([dummy], [1], 0)).wait()


def _spare_cores() -> int:
    """All cores but one: a step waits for its slowest thread, so a core that HTTP uses too costs more than it gives."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


def pick_device(name: str) -> torch.device:
    """The device of a setting; `auto` is CUDA where there is one. Raises `ConfigError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f"device = {name}: this machine has {count} CUDA devices; use cpu or auto")
    return device


def pick_kernels(name: Literal["auto", "torch", "triton"], device: torch.device) -> KernelName:
    """Which implementation runs on the device. Raises `ConfigError` for Triton where nothing compiles it."""
    if name == "auto":
        return default_for(device)
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigError("kernels = triton: the package triton is not installed; use torch or auto")
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "kernels = triton does not compile for a CPU; use torch or auto (TRITON_INTERPRET=1 interprets, to debug)"
        )
    return name


def pick_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own dtype on CUDA, and float32 on a CPU, where half precision is slow.

    Raises `ConfigError`.
    """
    if name == "auto":
        name = (config.dtype or "bfloat16") if device.type == "cuda" else "float32"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"the checkpoint's dtype {name!r} is not supported; set dtype to float32, bfloat16 or float16"
        )
    return dtype


def _caches_by_layer(config: ModelConfig, states: StatePool, kv: KVPool) -> list[Cache]:
    """One entry per layer, in the model's order."""
    linear = iter(range(len(config.linear_layers)))
    full = iter(range(len(config.full_layers)))
    return [
        states.layer(next(linear)) if isinstance(layer.mixer, LightningSpec) else kv.layer(next(full))
        for layer in config.layers
    ]


def _dummy(slot: int, length: int, table: list[int]) -> Sequence:
    """A prompt that belongs to no request."""
    return Sequence(
        request_id=f"dummy-{slot}",
        prompt_token_ids=[0] * length,
        sampling_params=SamplingParams(temperature=1.0, top_p=0.9, logprobs=1),
        block_table=array("i", table),
        state_slot=slot,
    )
