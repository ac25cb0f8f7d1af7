"""The device's memory as its allocator sees it: how much is free, what bounds it, and what an error about it says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import ConfigError
from ..messages import MemoryUse

ALLOCATED_BYTES = 2 << 20  # the allocator takes memory in such pieces; a tensor may leave most of its last one unused
ROUNDING_BYTES = 8 * ALLOCATED_BYTES  # of the tensors that a model of alike layers has beside its weights
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def free_memory(device: torch.device) -> tuple[int, int]:
    """(bytes free on the device, bytes it has), after the allocator has given back its unused pieces."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def hold_share(device: torch.device, use: MemoryUse) -> None:
    """For a process that does nothing else: keep all of its memory on the device within the configured share."""
    if device.type == "cuda":
        bound_allocator(device, use)


def bound_allocator(device: torch.device, use: MemoryUse) -> None:
    """From here on the allocator gives back its unused pieces rather than take more than the share. The workspace that
    was measured stays within reach, even where the share turned out too small for it."""
    free, everything = free_memory(device)
    reserved = torch.cuda.memory_reserved(device)
    outside = everything - free - reserved
    bound = max(use.total - outside - ROUNDING_BYTES, reserved + use.workspace)  # what lies outside may grow a little
    torch.cuda.set_per_process_memory_fraction(min(1.0, bound / everything), device)


@contextlib.contextmanager
def refuse_out_of_memory(what: str, remedy: str, where: str = "on the device") -> Iterator[None]:
    """Turn running out of memory into a `ConfigError` that says what did not fit and what to change."""
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory: {what} did not fit {where}; {remedy}") from None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error says so, or one that it came after: a capture that fails may fail again as it ends."""
    if error is None:
        return False
    is_told = isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)
    return is_told or _is_out_of_memory(error.__context__)
