"""The block tables of all running sequences, on the device, where they stay from step to step.

A table grows at its end alone, until its sequence gives everything back. So a step sends the cells that are new since
the sequence's last step, however long its table is.
"""

from __future__ import annotations

from array import array

import numpy as np
import torch
from torch import Tensor

from ..sequence import Sequence
from .arrays import Arrays

CELLS = {"cells": "int64", "blocks": "int32"}  # dtypes of what a step sends


class SentBlocks:
    """The host's side: which blocks of each sequence the device knows. width: columns of the table there."""

    def __init__(self, width: int) -> None:
        self._width = width
        # By slot: the table last sent to its row, and how many of its blocks. A table that was released is not used
        # again, so another one there belongs to a new owner, or to the same sequence after a preemption.
        self._sent: dict[int, tuple[array[int], int]] = {}

    def new_cells(self, sequences: list[Sequence]) -> Arrays:
        """`cells` [N] int64, flat places in `BlockTables.table`, and `blocks` [N] int32, their contents: all that these
        sequences' rows lack. They count as sent: they must be written before the next kernel reads the table.
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

    Cells past the end of a sequence's table hold what a former owner of the slot left: no kernel reads them.
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
        """Put blocks [N] int32 at flat places [N] int64. A place that comes twice must get the same block."""
        if len(cells):
            self.table.view(-1).scatter_(0, cells, blocks)

    def view(self, num_columns: int) -> Tensor:
        """[num_slots, num_columns] int32, the first blocks of every slot."""
        return self.table[:, :num_columns]
