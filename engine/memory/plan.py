"""How memory is split between recurrent state and KV cache, and what uses it. Torch-free arithmetic."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from ...configs.schema import EngineConfig
from ..errors import ConfigError

MAX_SNAPSHOTS = 4096  # unless more are asked for


class MemoryUse(msgspec.Struct, kw_only=True):
    """Bytes by what they are for. `total` is the share that the settings give: of a GPU `memory_fraction`, on a CPU
    the weights and `cpu_memory_gb`."""

    total: int
    weights: int = 0  # parameters and the rope table
    state: int = 0  # the state pool, with its rings
    kv: int = 0  # the KV pool and the block tables
    snapshots: int = 0  # states of the prefix cache
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
    num_snapshots: int = 0
    num_host_snapshots: int = 0
    notes: list[str] = field(default_factory=list)


def plan_pools(
    config: EngineConfig,
    use: MemoryUse,
    *,
    max_model_len: int,
    state_bytes_per_slot: int,
    kv_bytes_per_token: int,
    snapshot_bytes: int,
    cell_bytes: int,
    context_bytes: Callable[[int], int],
) -> MemoryPlan:
    """`plan_memory` as the settings want it, for what `use` leaves. Raises `ConfigError`, which tells all that takes
    memory."""
    try:
        return plan_memory(
            use.unassigned,
            state_bytes_per_slot=state_bytes_per_slot,
            kv_bytes_per_token=kv_bytes_per_token,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            cell_bytes=cell_bytes,
            context_bytes=context_bytes,
            num_kv_blocks=config.num_kv_blocks,
            snapshot_bytes=snapshot_bytes,
            num_snapshots=config.snapshots if config.prefix_cache else 0,
            host_bytes=int(config.host_snapshot_gb * 1e9),
        )
    except ConfigError as error:
        taken = ", ".join(f"{kind} {num_bytes:,}" for kind, num_bytes in use.by_kind().items() if num_bytes)
        raise ConfigError(f"{error} (of {use.total:,} bytes: {taken})") from None


def context_length(config: EngineConfig, longest: int) -> int:
    """The context asked for, which the checkpoint's bounds. Raises `ConfigError`."""
    wanted = config.max_model_len or longest
    if wanted > longest:
        raise ConfigError(f"max_model_len ({wanted}) exceeds the checkpoint's context ({longest}); lower it")
    return wanted


def plan_memory(
    budget: int,
    *,
    state_bytes_per_slot: int,
    kv_bytes_per_token: int,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    cell_bytes: int = 0,
    context_bytes: Callable[[int], int] = lambda length: 0,
    num_kv_blocks: int | None = None,
    snapshot_bytes: int = 0,
    num_snapshots: int | None = 0,
    host_bytes: int = 0,
) -> MemoryPlan:
    """Split `budget` bytes.

    The context comes first: the longest, up to `max_model_len`, whose blocks fit beside all that its length costs,
    `cell_bytes` per slot and block in the block tables, and once `context_bytes` of the length. Then come slots, for
    max_num_seqs, but at most half: a slot without room for its KV cache is of no use. Then come snapshots of the
    prefix cache, `num_snapshots` or (None) a quarter of what is left, as long as the blocks of one full context fit
    beside them. What is left goes to blocks: no more than every slot could fill at the full context length, and as
    many again for the prefix cache when there is one. `host_bytes` of host memory hold further snapshots. A size
    that does not fit is clamped and noted; `ConfigError` only when not even one sequence fits.
    """
    notes: list[str] = []
    block_bytes = kv_bytes_per_token * block_size

    def split(length: int) -> tuple[int, int]:
        """(slots, bytes that are left for snapshots and blocks) with such a context."""
        left = budget - context_bytes(length)
        slot_bytes = state_bytes_per_slot + cell_bytes * -(-length // block_size)
        slots = min(max_num_seqs, max(left // 2, 0) // slot_bytes)
        return slots, left - slots * slot_bytes

    def fits(length: int) -> bool:
        slots, rest = split(length)
        return slots > 0 and rest >= -(-length // block_size) * block_bytes

    longest = max_model_len if num_kv_blocks is None else min(max_model_len, num_kv_blocks * block_size)
    if not fits(longest):
        shortest = min(block_size, longest)
        if not fits(shortest):
            left = budget - context_bytes(shortest)
            raise ConfigError(_refusal(left, *split(shortest), state_bytes_per_slot, block_bytes))
        counts = range(longest // block_size + 1)
        too_many = bisect.bisect_left(counts, True, lo=2, key=lambda num_blocks: not fits(num_blocks * block_size))
        longest = (too_many - 1) * block_size
    slots, rest = split(longest)
    if slots < max_num_seqs:
        notes.append(f"max_num_seqs clamped from {max_num_seqs} to {slots}: more states do not fit in half the memory")
    blocks_per_sequence = -(-longest // block_size)
    snapshots = _plan_snapshots(num_snapshots, rest, blocks_per_sequence * block_bytes, snapshot_bytes)
    if num_snapshots is not None and snapshots < num_snapshots:
        notes.append(f"snapshots clamped from {num_snapshots} to {snapshots}: no more fit beside a context")
    blocks = slots * blocks_per_sequence * (2 if snapshots else 1)
    if block_bytes:
        blocks = min(blocks, (rest - snapshots * snapshot_bytes) // block_bytes)
    if num_kv_blocks is not None:
        if num_kv_blocks > blocks:
            notes.append(f"num_kv_blocks clamped from {num_kv_blocks} to {blocks}: no more fit or could be used")
        blocks = min(blocks, num_kv_blocks)
    if longest < max_model_len:
        beside = f", beside {context_bytes(longest):,} bytes for its positions" if context_bytes(longest) else ""
        notes.append(f"max_model_len clamped from {max_model_len} to {longest}: the KV cache holds no more{beside}")
    on_host = host_bytes // snapshot_bytes if snapshots else 0
    return MemoryPlan(slots, blocks, longest, snapshots, on_host, notes)


def _refusal(left: int, slots: int, rest: int, state_bytes: int, block_bytes: int) -> str:
    """Why not even one sequence of one block fits into `left` bytes, of which slots leave `rest`."""
    if not slots:
        return (
            f"one sequence's recurrent state takes {state_bytes:,} bytes and {max(left, 0):,} bytes are free for state "
            "and KV cache, half of them for state; raise memory_fraction (or cpu_memory_gb), or use a smaller "
            "state_dtype"
        )
    return (
        f"no memory is left for a KV cache beside {slots} states of {state_bytes:,} bytes: a block takes "
        f"{block_bytes:,} bytes and {rest:,} are free; lower max_num_seqs or block_size, or raise memory_fraction (or "
        "cpu_memory_gb)"
    )


def _plan_snapshots(wanted: int | None, rest: int, context_bytes: int, snapshot_bytes: int) -> int:
    """How many fit in `rest` bytes beside the blocks of a context."""
    if wanted == 0 or not snapshot_bytes:
        return 0
    most = max(0, rest - context_bytes) // snapshot_bytes
    return min(most, MAX_SNAPSHOTS, rest // 4 // snapshot_bytes) if wanted is None else min(most, wanted)
