"""Tensors that always travel together, as the kernels take them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .quantised import FP8, spread, unpack_int4


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


WeightKind = Literal["plain", "fp8", "int8", "int4"]
KINDS: dict[torch.dtype, WeightKind] = {FP8: "fp8", torch.int8: "int8", torch.int32: "int4"}


class Weight(NamedTuple):
    """A matrix [N, K], or one for each of E experts, as it is stored. The dtype of `data` tells the format.

    - Any other float dtype is the matrix itself, "plain", without a scale.
    - float8_e4m3fn, "fp8": scale float32 [.., ceil(N / block[0]), ceil(K / block[1])]; block = (128, 128) or (1, K).
    - int8, "int8": scale [.., N, K / g] in bfloat16, float16 or float32; block = (1, g).
    - int32, "int4": data [.., N, K / 8] of eight nibbles each, in the layout of `quantised.pack_int4`; scale as of
      int8; K a multiple of 64. The value of a nibble is nibble - 8, or nibble - 8 - zero.

    An item is value * scale, computed in float32 and rounded to the dtype that is wanted.
    """

    data: Tensor  # [N, K] or [E, N, K]; of int4 [.., N, K / 8]
    scale: Tensor | None = None
    zero: Tensor | None = None  # [.., N, K / g] int8, of int4 alone
    block: tuple[int, int] = (1, 0)  # rows and columns that share a scale

    @property
    def format(self) -> WeightKind:
        return KINDS.get(self.data.dtype, "plain")

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K] or [E, N, K] of the matrix, whatever its items are packed in."""
        *leading, width = self.data.shape
        return (*leading, width * 8 if self.format == "int4" else width)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def tensors(self) -> list[Tensor]:
        """`data`, and those of `scale` and `zero` that there are."""
        return [tensor for tensor in (self.data, self.scale, self.zero) if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def plain(self) -> Tensor:
        """`data`, for a kernel that knows no number format.

        Raises:
            NotImplementedError: if the matrix has a scale.
        """
        if self.scale is not None:
            raise NotImplementedError(f"no kernel multiplies by {self.data.dtype} with a scale here")
        return self.data

    def rows(self, start: int, count: int) -> Weight:
        """A view of `count` rows, from `start` on; both are multiples of block[0], or the rows end the matrix."""
        step = self.block[0]
        first, last = start // step, -(-(start + count) // step)
        scale = None if self.scale is None else self.scale[..., first:last, :]
        zero = None if self.zero is None else self.zero[..., first:last, :]
        return Weight(self.data[..., start : start + count, :], scale, zero, self.block)

    def expert(self, index: int) -> Weight:
        """A view of one expert's matrix."""
        scale = None if self.scale is None else self.scale[index]
        return Weight(self.data[index], scale, None if self.zero is None else self.zero[index], self.block)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The matrix [.., N, K] in `dtype`; `data` itself where that is already so."""
        if self.scale is None:
            return self.data.to(dtype)
        values = unpack_int4(self.data).float().sub_(8) if self.format == "int4" else self.data.float()
        if self.zero is not None:
            values -= spread(self.zero.float(), self.block, values.shape)
        return values.mul_(spread(self.scale.float(), self.block, values.shape)).to(dtype)
