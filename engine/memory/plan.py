"""The split of memory between states, snapshots and KV cache. Torch-free arithmetic."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

from ...configs.schema import EngineConfig
from ..errors import ConfigError
from ..messages import MemoryUse

MAX_SNAPSHOTS = 4096  # on the device, unless the setting `snapshots` asks for more


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of the pools. `notes` has a sentence per clamped size, with the reason."""

    num_state_slots: int
    num_kv_blocks: int
    max_model_len: int
    num_snapshots: int = 0
    num_host_snapshots: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PoolCosts:
    """Bytes on the device per slot, token, block table entry and snapshot."""

    slot: int  # states, rings, and a row of the sampler's tables
    token: int  # in the blocks of all layers
    block_size: int  # tokens
    cell: int = 0  # an entry of the block tables; one per slot and block of a context
    snapshot: int = 0
    context: Callable[[int], int] = lambda length: 0  # taken once for a context of that length; must not decrease

    @property
    def block(self) -> int:
        return self.token * self.block_size

    def blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def split(self, budget: int, max_num_seqs: int, length: int) -> tuple[int, int]:
        """(number of slots, bytes left for snapshots and blocks) for a context of `length` tokens. Slots take at most
        half of the budget."""
        left = budget - self.context(length)
        slot = self.slot + self.cell * self.blocks_for(length)
        num_slots = min(max_num_seqs, max(left // 2, 0) // slot)
        return num_slots, left - num_slots * slot


def plan_pools(config: EngineConfig, use: MemoryUse, costs: PoolCosts, *, max_model_len: int) -> MemoryPlan:
    """`plan_memory` with the settings, for the memory that `use` leaves unassigned. Raises `ConfigError`, whose text
    lists the uses of memory."""
    try:
        return plan_memory(
            use.unassigned,
            costs,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            num_kv_blocks=config.num_kv_blocks,
            num_snapshots=config.snapshots if config.prefix_cache else 0,
            host_bytes=int(config.host_snapshot_gb * 1e9),
        )
    except ConfigError as error:
        taken = ", ".join(f"{kind} {num_bytes:,}" for kind, num_bytes in use.by_kind().items() if num_bytes)
        raise ConfigError(f"{error} (of {use.total:,} bytes: {taken})") from None


def context_length(config: EngineConfig, longest: int) -> int:
    """The context length that the settings ask for, by default `longest`, the model's own. Raises `ConfigError` if it
    exceeds `longest`."""
    wanted = config.max_model_len or longest
    if wanted > longest:
        raise ConfigError(f"max_model_len ({wanted}) exceeds the checkpoint's context ({longest}); lower it")
    return wanted


def plan_memory(
    budget: int,
    costs: PoolCosts,
    *,
    max_num_seqs: int,
    max_model_len: int,
    num_kv_blocks: int | None = None,
    num_snapshots: int | None = 0,
    host_bytes: int = 0,
) -> MemoryPlan:
    """Split `budget` bytes.

    - Context: the longest, up to `max_model_len`, whose blocks fit beside the slots.
    - Slots: `max_num_seqs`, but at most half of the budget, because a slot without KV cache is useless.
    - Snapshots: `num_snapshots`, or a quarter of the rest if None. The blocks of one full context must fit beside them.
    - Blocks: the rest, at most as many as all slots can fill at the full context, twice as many with snapshots.

    `host_bytes` of host memory hold further snapshots. A size that does not fit is clamped and noted. Raises
    `ConfigError` if not even one sequence fits.
    """
    asked = max_model_len if num_kv_blocks is None else min(max_model_len, num_kv_blocks * costs.block_size)
    longest = _longest_context(costs, budget, max_num_seqs, asked)
    slots, rest = costs.split(budget, max_num_seqs, longest)
    context_blocks = costs.blocks_for(longest)
    snapshots = _plan_snapshots(num_snapshots, rest, context_blocks * costs.block, costs.snapshot)
    useful = slots * context_blocks * (2 if snapshots else 1)
    left = rest - snapshots * costs.snapshot
    most = min(useful, left // costs.block) if costs.block else useful
    blocks = most if num_kv_blocks is None else min(most, num_kv_blocks)
    notes = []
    if slots < max_num_seqs:
        notes.append(f"max_num_seqs clamped from {max_num_seqs} to {slots}: more states do not fit in half the memory")
    if num_snapshots is not None and snapshots < num_snapshots:
        notes.append(f"snapshots clamped from {num_snapshots} to {snapshots}: no more fit beside a context")
    if num_kv_blocks is not None and num_kv_blocks > most:
        notes.append(f"num_kv_blocks clamped from {num_kv_blocks} to {most}: no more fit or could be used")
    if longest < max_model_len:
        positions = costs.context(longest)
        beside = f", beside {positions:,} bytes for its positions" if positions else ""
        notes.append(f"max_model_len clamped from {max_model_len} to {longest}: the KV cache holds no more{beside}")
    on_host = host_bytes // costs.snapshot if snapshots else 0
    return MemoryPlan(slots, blocks, longest, snapshots, on_host, notes)


def _longest_context(costs: PoolCosts, budget: int, max_num_seqs: int, longest: int) -> int:
    """The longest context whose blocks fit beside its slots: `longest`, or a shorter one of whole blocks. Raises
    `ConfigError` if none fits.

    A longer context may have fewer slots, which frees memory for blocks. So fitting is monotonic only among contexts
    with the same number of slots. The search goes from long contexts with few slots to short ones with many.
    """

    def num_slots(num_blocks: int) -> int:
        return costs.split(budget, max_num_seqs, num_blocks * costs.block_size)[0]

    def fits(length: int) -> bool:
        slots, rest = costs.split(budget, max_num_seqs, length)
        return slots > 0 and rest >= costs.blocks_for(length) * costs.block

    if fits(longest):
        return longest
    last = longest // costs.block_size
    while last:
        slots = num_slots(last)
        first = 1 + bisect.bisect_left(range(1, last), True, key=lambda n: num_slots(n) <= slots)
        if fits(first * costs.block_size):
            same = range(first, last + 1)
            num_fitting = bisect.bisect_left(same, True, key=lambda n: not fits(n * costs.block_size))
            return (first - 1 + num_fitting) * costs.block_size
        last = first - 1
    shortest = min(costs.block_size, longest)
    left = budget - costs.context(shortest)
    raise ConfigError(_refusal(left, *costs.split(budget, max_num_seqs, shortest), costs))


def _refusal(left: int, slots: int, rest: int, costs: PoolCosts) -> str:
    """The reason why not even one sequence of one block fits. left: bytes for slots, snapshots and blocks. rest: bytes
    of these that `slots` slots leave."""
    if not slots:
        return (
            f"one sequence's recurrent state takes {costs.slot:,} bytes and {max(left, 0):,} bytes are free for state "
            "and KV cache, half of them for state; raise memory_fraction (or cpu_memory_gb), or use a smaller "
            "state_dtype"
        )
    return (
        f"no memory is left for a KV cache beside {slots} states of {costs.slot:,} bytes: a block takes "
        f"{costs.block:,} bytes and {rest:,} are free; lower max_num_seqs or block_size, or raise memory_fraction (or "
        "cpu_memory_gb)"
    )


def _plan_snapshots(wanted: int | None, rest: int, context_bytes: int, snapshot_bytes: int) -> int:
    """The number of snapshots that fit in `rest` bytes beside the blocks of a context."""
    if wanted == 0 or not snapshot_bytes:
        return 0
    most = max(0, rest - context_bytes) // snapshot_bytes
    return min(most, MAX_SNAPSHOTS, rest // 4 // snapshot_bytes) if wanted is None else min(most, wanted)
