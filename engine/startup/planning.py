"""Memory arithmetic that both the start of an engine and the forecast of `leyden info` use."""

from __future__ import annotations

import msgspec

from ...configs.schema import EngineConfig
from ..execution.block_tables import BlockTables
from ..execution.sampler import Sampler
from ..execution.served_model import ServedModel
from ..memory.plan import MemoryPlan, PoolCosts, context_length, plan_pools
from ..messages import MemoryUse
from ..sessions.carrier import device_bytes as session_bytes


def plan(served: ServedModel, config: EngineConfig, use: MemoryUse) -> MemoryPlan:
    """Sizes of the pools for the memory that `use` leaves unassigned. Raises `ConfigError` if not even one sequence
    fits."""
    costs = PoolCosts(
        slot=served.state_bytes_per_slot + Sampler.bytes_per_slot(served.spec.vocab_size),
        token=served.kv_bytes_per_token,
        block_size=config.block_size,
        cell=BlockTables.CELL_BYTES,
        snapshot=served.snapshot_bytes,
        context=lambda length: context_bytes(served, config, length),
    )
    return plan_pools(config, use, costs, max_model_len=context_length(config, served.spec.max_model_len))


def context_bytes(served: ServedModel, config: EngineConfig, length: int) -> int:
    """Bytes on the device that a context of this length takes once, for any number of sequences: the model's position
    tables and the buffers of sessions."""
    return served.model.position_bytes(length) + _session_bytes(served, config, length)


def sequence_bytes(served: ServedModel, config: EngineConfig, length: int) -> int:
    """Bytes on the device that each sequence of this length takes."""
    tables = Sampler.bytes_per_slot(served.spec.vocab_size) + BlockTables.bytes_per_slot(length, config.block_size)
    return served.state_bytes_per_slot + served.kv_bytes_per_token * length + tables


def planned_use(served: ServedModel, config: EngineConfig, plan: MemoryPlan, use: MemoryUse) -> MemoryUse:
    """`use` with the bytes of the plan's pools and tables."""
    slots, length = plan.num_state_slots, plan.max_model_len
    block_tables = slots * BlockTables.bytes_per_slot(length, config.block_size)
    return msgspec.structs.replace(
        use,
        weights=use.weights + served.model.position_bytes(length),
        state=slots * served.state_bytes_per_slot,
        kv=plan.num_kv_blocks * config.block_size * served.kv_bytes_per_token + block_tables,
        snapshots=plan.num_snapshots * served.snapshot_bytes,
        sampler=Sampler.bytes_for(slots, served.spec.vocab_size),
        other=use.other + _session_bytes(served, config, length),
    )


def _session_bytes(served: ServedModel, config: EngineConfig, length: int) -> int:
    has_buffers = served.device.type == "cuda" and config.session_folder is not None
    return session_bytes(length) if has_buffers else 0
