"""Tensors that always travel together, as the kernels take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Rows of one kind in a step, one sequence each.

    `starts` counts from the step's first token. Operations on rows of any length therefore take q, k, v and out from
    that token on: the whole axis, or what leads up to the rows' last token. Operations on rows of one token take a
    tensor of the rows alone, [B, ...], and read no `starts`.
    """

    slots: Tensor  # [B] int32, the slot of each row in the state pool; -1 = padding, which writes zeros to its output
    continues: Tensor  # [B] bool; False = the row is new, and its slot's content is ignored
    starts: Tensor  # [B + 1] int32; row b owns tokens starts[b] up to starts[b + 1]
    max_len: int  # tokens of the longest row, at least 1


class Ring(NamedTuple):
    """The last tokens of each slot, which its state does not hold yet. C = places of a slot, a power of two."""

    key: Tensor  # [num_slots, H, C, K] in any float dtype, contiguous but for the slots' stride
    value: Tensor  # [num_slots, H, C, V], likewise
    num_pending: Tensor  # [B] int32, tokens that wait in each row's ring, 0 .. C, oldest first


class HeadNorm(NamedTuple):
    """An RMS norm of each head's query and key, before they are rotated."""

    query: Tensor  # [D], in the dtype of q and k or float32
    key: Tensor  # [D]
    eps: float


class Weight(NamedTuple):
    """A matrix as it is stored."""

    data: Tensor  # [N, K], or [E, N, K] for experts
    scale: Tensor | None = None  # None = `data` is the matrix itself
    group: int = 0  # columns that share a scale; 0 without one

    def plain(self) -> Tensor:
        """`data`, for a kernel that knows no number format.

        Raises:
            NotImplementedError: if the matrix has a scale.
        """
        if self.scale is not None:
            raise NotImplementedError(f"no kernel multiplies by {self.data.dtype} with a scale yet")
        return self.data
