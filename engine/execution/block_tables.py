"""The block tables of all running sequences, kept on the device from step to step.

A table only grows at its end, until its sequence frees all blocks. So a step sends only the cells that are new since
the sequence's last step, however long the table is.
"""

from __future__ import annotations

from array import array

import numpy as np
import torch
from torch import Tensor

from ..sequence import Sequence
from .arrays import Arrays

CELLS = {"cells": "int64", "blocks": "int32"}  # dtypes of the arrays that a step sends


class SentBlocks:
    """Which blocks of each sequence the device has, as noted on the host. width: columns of `BlockTables.table`."""

    def __init__(self, width: int) -> None:
        self._width = width
        # By slot: the table that was last sent to its row, and how many of its blocks. A released table is not used
        # again, so a different table means a new owner, or the same sequence after a preemption.
        self._sent: dict[int, tuple[array[int], int]] = {}

    def new_cells(self, sequences: list[Sequence]) -> Arrays:
        """`cells` [N] int64, flat places in `BlockTables.table`, and `blocks` [N] int32, their contents: every block of
        these sequences that has not been sent. They count as sent, so the caller must write them before the next
        kernel reads the table.
        """
        cells, blocks = [np.empty(0, dtype=np.int64)], []
        for sequence in sequences:
            slot, table = sequence.state_slot, sequence.block_table
            assert slot is not None
            sent = self._sent.get(slot)
            first, end = sent[1] if sent is not None and sent[0] is table else 0, len(table)
            if first < end:
                row = slot * self._width
                cells.append(np.arange(row + first, row + end))
                blocks.append(table[first:])
                self._sent[slot] = table, end
        return {"cells": np.concatenate(cells), "blocks": np.frombuffer(b"".join(blocks), dtype=np.int32)}


class BlockTables:
    """table [num_slots, width] int32: row i names the KV blocks of the sequence in slot i, in their order.

    Cells past the end of a sequence's table hold blocks of former owners of the slot. No kernel reads them.
    """

    CELL_BYTES = 4

    @classmethod
    def bytes_per_slot(cls, max_model_len: int, block_size: int) -> int:
        return cls.CELL_BYTES * -(-max_model_len // block_size)

    def __init__(self, num_slots: int, width: int, device: torch.device) -> None:
        self.table = torch.zeros(num_slots, width, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes

    def write(self, cells: Tensor, blocks: Tensor) -> None:
        """Write blocks [N] int32 at flat places `cells` [N] int64. A place given twice must get the same block."""
        if len(cells):
            self.table.view(-1).scatter_(0, cells, blocks)

    def view(self, num_columns: int) -> Tensor:
        """[num_slots, num_columns] int32, the first blocks of every slot."""
        return self.table[:, :num_columns]
