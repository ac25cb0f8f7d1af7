"""The contract of a backend of linear layers of any kind."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

from ...kernels import Kernels

RING_SIZE = 16

Call = TypeVar("Call", contravariant=True)


class LinearBackend(Protocol[Call]):
    """One kind of linear attention for all rows of a batch. Nothing else is asked of a backend.

    `name` is the value of the setting. `ring_size` is the number of places in a slot's ring, 0 for none; without a ring
    there are no verify rows, and the engine refuses `speculative_tokens`. `replays` says that decode rows leave their
    tokens in the ring too. The table in `models/forward_batch.py` gives the number of tokens that wait in a ring after
    a step. The i-th of them lies at place i, unchanged. The model folds them into the state (`Mixer.fold`) before a row
    that does not read the ring. `prompts_in_graphs` is False if `forward` waits for the device in a step with prompts:
    such steps have no CUDA graphs.
    """

    name: str
    ring_size: int
    replays: bool
    prompts_in_graphs: bool

    def forward(self, call: Call) -> Tensor:
        """Fills and returns `call.out`, and updates the slots and rings of the batch's rows."""


class BackendFactory(Protocol[Call]):
    """An entry of `LINEAR_BACKENDS`: a backend's class, or a function that makes one."""

    def __call__(self, kernels: Kernels, *, speculative: bool = False) -> LinearBackend[Call]:
        """`speculative`: rows may bring drafts, which need a ring with room for `speculative_tokens` and two more."""
