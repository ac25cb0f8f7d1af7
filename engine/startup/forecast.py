"""The plan that an engine would start with, made without loading weights. `leyden info` prints it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...configs.schema import EngineConfig
from ..errors import ConfigError
from ..execution.served_model import ServedModel
from ..memory.plan import MemoryPlan, context_length
from ..messages import MemoryUse
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_files import TOKENIZER_FILE
from .model import check_checkpoint, place_model
from .planning import context_bytes, plan, planned_use, sequence_bytes

CONTEXTS = (1024, 8192, 32768, 131072, 1048576)


class Forecast(NamedTuple):
    """The plan of a start, made by the start's own arithmetic. It lacks the memory that only a start can measure."""

    served: ServedModel  # on the device `meta`
    share: int  # bytes to plan for
    origin: str  # of the share, in words
    plan: MemoryPlan | None  # None = not even one sequence fits
    use: MemoryUse | None  # of the planned share
    refusal: str  # the reason why `plan` is None; otherwise empty
    num_fitting: dict[int, int]  # tokens per sequence -> number of such sequences that fit beside the weights


def forecast(config: EngineConfig, memory_gb: float | None = None) -> Forecast:
    """The start's plan for `memory_gb`, or for the memory that the settings give (None).

    Checks the headers of the weights, and loads the tokenizer, if these files exist. Raises `CheckpointError` or
    `ConfigError`.
    """
    served = place_model(config, on_meta=True)
    if (served.folder / TOKENIZER_FILE).exists() or config.tokenizer or config.chat_template:
        Tokenizer.of(config)
    check_checkpoint(config, served)
    context_length(config, served.spec.max_model_len)  # raises here: a wrong setting is no `refusal`
    use, origin = _share(served, config, memory_gb)
    memory_plan, planned, refusal = None, None, ""
    try:
        memory_plan = plan(served, config, use)
        planned = planned_use(served, config, memory_plan, use)
    except ConfigError as error:
        refusal = str(error)
    return Forecast(served, use.total, origin, memory_plan, planned, refusal, _num_fitting(served, config, use))


def _share(served: ServedModel, config: EngineConfig, memory_gb: float | None) -> tuple[MemoryUse, str]:
    """(the memory to plan for, with the weights as its only use; the origin of the number, in words)."""
    weights = served.weight_bytes
    if memory_gb is not None:
        return MemoryUse(total=int(memory_gb * 1e9), weights=weights), "as given"
    if served.device.type == "cuda":
        total = int(torch.cuda.get_device_properties(served.device).total_memory * config.memory_fraction)
        return MemoryUse(total=total, weights=weights), f"memory_fraction {config.memory_fraction} of the GPU"
    total = weights + int(config.cpu_memory_gb * 1e9)
    return MemoryUse(total=total, weights=weights), "the weights and cpu_memory_gb"


def _num_fitting(served: ServedModel, config: EngineConfig, use: MemoryUse) -> dict[int, int]:
    lengths = sorted({min(context, served.spec.max_model_len) for context in CONTEXTS})
    return {
        length: max(
            0, (use.unassigned - context_bytes(served, config, length)) // sequence_bytes(served, config, length)
        )
        for length in lengths
    }
