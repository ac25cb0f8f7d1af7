"""Lightning attention: S_t = e^{-s} S_{t-1} + k_t v_t^T,  o_t = scale * q_t S_t per head."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..bundles import Ring, Rows


class Lightning(Protocol):
    """Common to all: q, k: [T, H, K]; v, out: [T, H, V]; float32, bfloat16 or float16, strided views allowed; slopes:
    [H] float32, positive; state: [num_slots, H, K, V] in any float dtype, updated in place for the rows' slots, other
    slots untouched bit for bit. A padding row writes zeros to its part of `out` and nothing to a pool. `out` is
    returned.
    """

    def minimax(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        rows: Rows,
        out: Tensor,
    ) -> Tensor:
        """Rows of any length, parallel over blocks of their tokens."""

    def seg_la(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        rows: Rows,
        out: Tensor,
    ) -> Tensor:
        """Rows of any length in one launch, each walked from end to end. Arguments and effects as in `minimax`."""

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        rows: Rows,
        out: Tensor,
    ) -> Tensor:
        """Rows of one token: q, k [B, H, K], v, out [B, H, V]."""

    def snapshot(
        self,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        state: Tensor,
        rows: Rows,
        places: Tensor,
        snapshots: Tensor,
    ) -> None:
        """Save states that rows are about to pass in `minimax` or `seg_la`, which must come after it.

        places: [S, 3] int32, each (b, n, c): the state after the first n >= 1 tokens of row b goes to snapshots[c];
        c = -1 = padding, of which nothing else is read. No c comes twice, and row b is no padding row. snapshots:
        [N, H, K, V] in any float dtype. `state` is read only.
        """

    def replay(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        ring: Ring,
        rows: Rows,
        out: Tensor,
    ) -> Tensor:
        """`decode` that writes the state once per C tokens.

        The token is appended to the row's ring, in place. Where that makes C or more, or the row is new, all waiting
        tokens are folded into the state, and the caller's count must return to 0. Otherwise the count goes up by one.
        """

    def verify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        scale: float,
        state: Tensor,
        ring: Ring,
        rows: Rows,
        out: Tensor,
    ) -> Tensor:
        """Rows of a few tokens, of which perhaps only the first will be kept: the state is read, never written.

        A row's m tokens see the state, the p = num_pending[b] tokens that wait in the ring, and each other. They are
        left in the ring at places p .. p + m - 1; p + m <= C is the caller's duty. The next num_pending says how many
        are kept; later ones are overwritten. In a new row p counts as 0, and neither state nor ring is read. Padding
        rows may be of any length.
        """

    def fold(self, slopes: Tensor, state: Tensor, ring: Ring, slots: Tensor) -> None:
        """Fold the waiting tokens of some slots into their states, in place; afterwards none wait.

        slots: [B] int32, each once; ring.num_pending belongs to them. Slot -1 and slots where no token waits are left
        alone with any content.
        """
