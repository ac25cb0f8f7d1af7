"""How memory is split between recurrent state and KV cache, and what uses it. Torch-free arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from .errors import ConfigError

MAX_CHECKPOINTS = 4096  # unless more are asked for


class MemoryUse(msgspec.Struct, kw_only=True):
    """Bytes by what they are for. `total` is the share that the settings give: of a GPU `memory_fraction`, on a CPU
    the weights and `cpu_memory_gb`."""

    total: int
    weights: int = 0  # parameters and the rope table
    state: int = 0  # the state pool, with its rings
    kv: int = 0  # the KV pool
    checkpoints: int = 0  # states of the prefix cache
    sampler: int = 0  # tables of token counts, one row per slot
    workspace: int = 0  # what the largest step takes at its peak beside all of these
    graphs: int = 0  # CUDA graphs
    other: int = 0  # the CUDA context, compiled kernels, rounding, buffers of sessions, other processes

    def by_kind(self) -> dict[str, int]:
        """Every kind but `total`, which is their sum together with what is `unassigned`."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name != "total"}

    @property
    def unassigned(self) -> int:
        """What is left; negative when the share is exceeded."""
        return self.total - sum(self.by_kind().values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of the two pools. `notes` says what was clamped and why."""

    num_state_slots: int
    num_kv_blocks: int
    max_model_len: int
    num_checkpoints: int = 0
    num_host_checkpoints: int = 0
    notes: list[str] = field(default_factory=list)


def plan_memory(
    budget: int,
    *,
    state_bytes_per_slot: int,
    kv_bytes_per_token: int,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    num_kv_blocks: int | None = None,
    checkpoint_bytes: int = 0,
    num_checkpoints: int | None = 0,
    host_bytes: int = 0,
) -> MemoryPlan:
    """Split `budget` bytes.

    Slots come first, for max_num_seqs, but take at most half: a slot without room for its KV cache is of no use.
    Then come checkpoints of the prefix cache, `num_checkpoints` or (None) a quarter of what is left, as long as the
    blocks of one full context fit beside them. What is left goes to blocks: no more than every slot could fill at the
    full context length, and as many again for the prefix cache when there is one. `host_bytes` of host memory hold
    further checkpoints. A size that does not fit is clamped
    and noted; `ConfigError` only when not even one sequence fits.
    """
    notes: list[str] = []
    slots = min(max_num_seqs, max(budget // 2, 0) // state_bytes_per_slot)
    if slots == 0:
        raise ConfigError(
            f"one sequence's recurrent state takes {state_bytes_per_slot:,} bytes and {max(budget, 0):,} bytes are "
            "free for state and KV cache, half of them for state; raise memory_fraction (or cpu_memory_gb), or use "
            "a smaller state_dtype"
        )
    if slots < max_num_seqs:
        notes.append(f"max_num_seqs clamped from {max_num_seqs} to {slots}: more states do not fit in half the memory")
    blocks_per_sequence = -(-max_model_len // block_size)
    block_bytes = kv_bytes_per_token * block_size
    rest = budget - slots * state_bytes_per_slot
    checkpoints = _plan_checkpoints(num_checkpoints, rest, blocks_per_sequence * block_bytes, checkpoint_bytes)
    if num_checkpoints is not None and checkpoints < num_checkpoints:
        notes.append(f"state_checkpoints clamped from {num_checkpoints} to {checkpoints}: no more fit beside a context")
    blocks = slots * blocks_per_sequence * (2 if checkpoints else 1)
    if block_bytes:
        blocks = min(blocks, (rest - checkpoints * checkpoint_bytes) // block_bytes)
    if num_kv_blocks is not None:
        if num_kv_blocks > blocks:
            notes.append(f"num_kv_blocks clamped from {num_kv_blocks} to {blocks}: no more fit or could be used")
        blocks = min(blocks, num_kv_blocks)
    if blocks <= 0:
        raise ConfigError(
            f"no memory is left for a KV cache beside {slots} states of {state_bytes_per_slot:,} bytes; "
            "lower max_num_seqs or raise memory_fraction (or cpu_memory_gb)"
        )
    if blocks < blocks_per_sequence:
        notes.append(f"max_model_len clamped from {max_model_len} to {blocks * block_size}: the KV cache holds no more")
    on_host = host_bytes // checkpoint_bytes if checkpoints else 0
    return MemoryPlan(slots, blocks, min(max_model_len, blocks * block_size), checkpoints, on_host, notes)


def _plan_checkpoints(wanted: int | None, rest: int, context_bytes: int, checkpoint_bytes: int) -> int:
    """How many fit in `rest` bytes beside the blocks of a context."""
    if wanted == 0 or not checkpoint_bytes:
        return 0
    most = max(0, rest - context_bytes) // checkpoint_bytes
    return min(most, MAX_CHECKPOINTS, rest // 4 // checkpoint_bytes) if wanted is None else min(most, wanted)
