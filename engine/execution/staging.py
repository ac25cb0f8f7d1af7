"""Host memory that steps borrow. It is pinned on CUDA and reused, since allocating it costs more than filling it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..outputs import TokenLogprobs


class Staging:
    """The inputs of one step on their way to the device, and its tokens on their way back. No other step writes here
    until the event after the tokens says that both have arrived."""

    def __init__(self, num_bytes: int, num_rows: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.inputs = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self.array = self.inputs.numpy()  # the same memory
        self.tokens = torch.empty(num_rows, dtype=torch.int32, pin_memory=is_cuda)
        self._event = torch.cuda.Event() if is_cuda else None

    def bring_home(self, tokens: Tensor) -> None:
        """Start copying the tokens [B] to the host."""
        self.tokens.copy_(tokens, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> list[int]:
        """Wait for the tokens. The inputs are free too by then: the step read them before it drew."""
        if self._event is not None:
            self._event.synchronize()
        return self.tokens.tolist()


class StagingPool:
    """Reusable `Staging` buffers of one graph shape. A buffer is given back when its step's tokens are read, so at most
    one exists per step in flight."""

    def __init__(self, num_bytes: int, num_rows: int, device: torch.device) -> None:
        self._shape = (num_bytes, num_rows, device)
        self._free: list[Staging] = []

    def take(self) -> Staging:
        return self._free.pop() if self._free else Staging(*self._shape)

    def give_back(self, staging: Staging) -> None:
        self._free.append(staging)


class StagedTokens:
    """The tokens of a step of `num_rows` rows. Reading them gives the staging back to the pool."""

    def __init__(self, pool: StagingPool, staging: Staging, num_rows: int) -> None:
        self._pool = pool
        self._staging: Staging | None = staging
        self._num_rows = num_rows

    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """Wait for the tokens (-1 = bad logits); returns them and no log-probabilities. To be called once."""
        assert self._staging is not None, "the tokens were read before"
        tokens = self._staging.read()[: self._num_rows]
        self._pool.give_back(self._staging)
        self._staging = None
        return tokens, [None] * self._num_rows
