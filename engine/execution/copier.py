"""Carries out the pool operations of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..memory.operations import Fold, Fork, Move, Operation, Restore, Save
from ..memory.pools import KVPool, SnapshotPool, StatePool
from .arrays import upload


class Copier:
    """The one place that copies between slots, blocks and snapshots of the pools.

    fold: takes slots [N], each once, numbers of waiting tokens [N] and of computed tokens [N], all int32. It adds the
    waiting tokens of each slot's ring to the slot's state, in all layers.
    """

    def __init__(
        self,
        states: StatePool,
        snapshots: SnapshotPool,
        kv: KVPool,
        fold: Callable[[Tensor, Tensor, Tensor], None],
        device: torch.device,
    ) -> None:
        self.states = states
        self.snapshots = snapshots
        self.kv = kv
        self._fold = fold
        self._device = device

    @torch.inference_mode()
    def make(self, operations: Sequence[Operation]) -> None:
        """Launch the operations on the current stream: all folds together, then the others in their order.

        The caller guarantees that no other operation writes to a slot before the slot's fold.
        """
        folds = [operation for operation in operations if isinstance(operation, Fold)]
        if folds:
            columns = np.array(folds, dtype=np.int32).T
            sent = upload(dict(zip(Fold._fields, columns, strict=True)), self._device)
            self._fold(*(sent[name] for name in Fold._fields))
        for operation in operations:
            match operation:
                case Fork(source, target, blocks):
                    _copy(self.states.slot(source), self.states.slot(target))
                    self._copy_blocks(blocks)
                case Save(slot, snapshot):
                    _copy(self.states.slot(slot), self.snapshots[snapshot])
                case Restore(snapshot, slot, blocks):
                    _copy(self.snapshots[snapshot], self.states.slot(slot))
                    self._copy_blocks(blocks)
                case Move(source, target):
                    self.snapshots.row(target).copy_(self.snapshots.row(source), non_blocking=True)

    def _copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """pairs: the number of each block, and the number of the block that becomes its copy."""
        if pairs:
            source, target = np.array(pairs, dtype=np.int64).T
            sent = upload({"source": source, "target": target}, self._device)
            self.kv.copy(sent["source"], sent["target"])


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    """Copy source[i] to target[i], whose dtype and device may differ."""
    for a, b in zip(source, target, strict=True):
        b.copy_(a, non_blocking=True)
