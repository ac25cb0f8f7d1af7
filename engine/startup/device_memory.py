"""The memory of a CUDA device as its allocator sees it: its free bytes, its bound, and its out-of-memory errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import ConfigError
from ..messages import MemoryUse

ALLOCATED_BYTES = 2 << 20  # the allocator's unit; a tensor may leave most of its last unit unused
ROUNDING_BYTES = 8 * ALLOCATED_BYTES  # unused parts of the few large tensors beside the weights
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def free_memory(device: torch.device) -> tuple[int, int]:
    """(free bytes, all bytes) of the device. Makes the allocator give back its unused memory first."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def hold_share(device: torch.device, use: MemoryUse) -> None:
    """Keep all of this process's memory on the device within the configured share. For a process of the engine alone.
    Does nothing on a CPU."""
    if device.type == "cuda":
        bound_allocator(device, use)


def bound_allocator(device: torch.device, use: MemoryUse) -> None:
    """Bound the allocator: it gives back unused memory before it exceeds the share. The measured workspace stays
    allowed, even if the share is too small for it."""
    free, everything = free_memory(device)
    reserved = torch.cuda.memory_reserved(device)
    outside = everything - free - reserved
    bound = max(use.total - outside - ROUNDING_BYTES, reserved + use.workspace)  # `outside` may grow a little
    torch.cuda.set_per_process_memory_fraction(min(1.0, bound / everything), device)


@contextlib.contextmanager
def refuse_out_of_memory(what: str, remedy: str, where: str = "on the device") -> Iterator[None]:
    """Turn an out-of-memory error into a `ConfigError`. what: the things that did not fit. remedy: the settings to
    change."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory: {what} did not fit {where}; {remedy}") from None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised after, means out of memory. A failing capture raises a second error
    when it ends."""
    if error is None:
        return False
    is_told = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)
    return is_told or _is_out_of_memory(error.__context__)
