"""Runs one step: prepare the batch, forward, sample. Owns the model and the pools."""

from __future__ import annotations

import importlib.util
import os
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
from ..models.minimax import Cache
from ..models.registry import FAMILIES
from ..models.weights import fill_with_noise, load_weights
from .batch import build_batch
from .errors import ConfigError
from .memory import MemoryPlan, plan_memory
from .outputs import TokenLogprobs
from .pools import KVPool, StatePool
from .sampler import Sampled, sample, token_logprobs
from .sampling_params import SamplingParams
from .scheduler import ScheduledBatch
from .sequence import Sequence

PROMPT_LOGPROB_ROWS = 64  # rows of vocabulary-wide float32 that exist at once


@dataclass(slots=True)
class StepResult:
    """What a step computed. `sampled` belongs to `completing`: the rows whose tokens are now all computed."""

    completing: list[Sequence]
    sampled: Sampled | None
    prompt_logprobs: dict[Sequence, list[TokenLogprobs]]


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
        kernels = load_kernels(self.kernel_name)
        linear_backend = LINEAR_BACKENDS[config.linear_backend](kernels)
        self.ring_size = linear_backend.ring_size
        self.model = FAMILIES[self.model_config.architecture].module()(
            self.model_config,
            kernels,
            linear_backend,
            device=self.device,
            dtype=self.dtype,
        )
        if config.load_format == "dummy":
            fill_with_noise(self.model.parameters())
        else:
            load_weights(self.folder, self.model.targets(), ignored=self.model.ignored_names(), progress=progress)
        self.plan = self._size_pools(config)
        self.model.reserve_positions(self.plan.max_model_len)
        self.warm_up()

    @torch.inference_mode()
    def execute(self, scheduled: ScheduledBatch) -> StepResult:
        """Compute the scheduled tokens, write state and KV pools, and sample where a row's tokens are complete."""
        batch = build_batch(scheduled, self.block_size, self.device)
        hidden = self.model(batch, self.caches)
        completing = [scheduled.sequences[row] for row in scheduled.completing_rows]
        sampled = None
        if completing:
            logits = self.model.compute_logits(hidden[batch.logits_indices])
            sampled = sample(logits, completing)
        return StepResult(completing, sampled, self._prompt_logprobs(scheduled, hidden))

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
            state_bytes_per_slot=self.state_bytes_per_slot,
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
            self.execute(ScheduledBatch(dummies, [length] * rows, rows))
            torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"a step of max_num_batched_tokens = {tokens} tokens does not fit on the device; "
                "lower it or max_num_seqs"
            ) from None
        peak = torch.cuda.max_memory_allocated(self.device) - self.states.nbytes - self.kv.nbytes
        del self.states, self.kv, self.caches
        torch.cuda.empty_cache()
        return peak

    def warm_up(self) -> None:
        """A prefill and a decode step, so that most of the compiling is done before the first request. Uses slot 0 and
        the first blocks, which are free: what it leaves there is what any former owner leaves."""
        num_blocks = -(-min(3, self.plan.max_model_len) // self.block_size)
        dummy = _dummy(0, min(2, self.plan.max_model_len), list(range(num_blocks)))
        self.execute(ScheduledBatch([dummy], [dummy.num_tokens], 1))
        if dummy.num_tokens < self.plan.max_model_len:
            dummy.num_computed_tokens = dummy.num_tokens
            dummy.output_token_ids.append(0)
            self.execute(ScheduledBatch([dummy], [1], 0))


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
        block_table=table,
        state_slot=slot,
    )
