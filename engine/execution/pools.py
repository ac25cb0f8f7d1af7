"""All device memory that steps read and write, besides the weights. Its size is set once, at start."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.mixers.cache import LayerCache
from ..memory.pools import KVPool, SnapshotPool, StatePool, layer_caches
from .block_tables import BlockTables
from .sampler import Sampler
from .served_model import ServedModel


@dataclass(frozen=True, slots=True)
class DevicePools:
    """The pools of `memory.pools`, the block tables, and the sampler's tables."""

    block_size: int
    states: StatePool
    snapshots: SnapshotPool
    kv: KVPool
    caches: list[LayerCache]  # views of the three above, one per layer
    tables: BlockTables
    sampler: Sampler

    @classmethod
    def allocate(
        cls,
        served: ServedModel,
        *,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        num_snapshots: int = 0,
    ) -> DevicePools:
        """Uninitialised pools for `num_slots` sequences at once. Snapshots on the host are allocated later."""
        kept, device = served.model.caches, served.device
        states = StatePool(kept, num_slots, served.dtypes, device=device)
        snapshots = SnapshotPool(kept, num_snapshots, served.snapshot_dtypes, device=device)
        kv = KVPool(kept, num_blocks, block_size, served.dtypes, device=device)
        return cls(
            block_size,
            states,
            snapshots,
            kv,
            caches=layer_caches(kept, states, snapshots, kv),
            tables=BlockTables(num_slots, -(-max_model_len // block_size), device),
            sampler=Sampler(served.kernels, num_slots, served.spec.vocab_size, device),
        )
