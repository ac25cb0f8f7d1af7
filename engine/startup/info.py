"""The description of a started engine for its clients."""

from __future__ import annotations

import torch

from ...configs.schema import EngineConfig
from ..messages import EngineInfo
from .build import Built


def engine_info(config: EngineConfig, built: Built) -> EngineInfo:
    """Describe the model, the device and the sizes of the pools of an engine that `build` has started."""
    served, plan = built.runner.served, built.plan
    spec, device = served.spec, served.device
    return EngineInfo(
        model_path=str(served.folder),
        architecture=spec.architecture,
        num_parameters=served.num_parameters,
        layer_counts=spec.layer_counts,
        vocab_size=spec.vocab_size,
        max_model_len=plan.max_model_len,
        eos_token_ids=list(spec.eos_token_ids),
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        dtype=str(served.dtype).removeprefix("torch."),
        state_dtype=str(served.dtypes.state).removeprefix("torch."),
        linear_backend=served.linear_backend,
        kernels=served.kernel_name,
        num_state_slots=plan.num_state_slots,
        max_waiting=config.max_waiting,
        num_kv_blocks=plan.num_kv_blocks,
        num_snapshots=plan.num_snapshots,
        num_host_snapshots=plan.num_host_snapshots,
        block_size=config.block_size,
        speculative_tokens=config.speculative_tokens,
        speculative_max_rows=config.speculative_max_rows if config.speculative_tokens else 0,
        weight_bytes=served.weight_bytes,
        quantised_bytes=served.quantised_bytes,
        memory=built.use,
        state_bytes_per_slot=served.state_bytes_per_slot,
        kv_bytes_per_token=served.kv_bytes_per_token,
        has_sessions=config.session_folder is not None,
        notes=plan.notes,
    )
