"""Which part of a model one rank computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size` ranks that compute each layer together. Rank 0 of 1 is the whole model.

    Modules of a rank have its share of the heads, or of the inner width. Two parts know that other ranks exist:
    products whose input is split sum their outputs, and the head gathers its logits.

    Raises:
        NotImplementedError: for more than one rank.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size != 1 or self.rank != 0:
            raise NotImplementedError(f"rank {self.rank} of {self.size}: a model is computed by one rank")

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in x's memory."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' x [..., N], one after another in the last dim: [..., size * N]."""
        return x
