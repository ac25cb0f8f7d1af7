"""State slots: the rows of the state pool, one per running sequence."""

from __future__ import annotations

from collections.abc import Iterable

from ..sequence import Sequence


class SlotManager:
    """Hands out the slots 0 .. num_slots - 1. A freed slot is dirty: its next owner must not read it."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # taken from the end

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_slots - len(self._free)

    def take(self, sequence: Sequence) -> None:
        assert sequence.state_slot is None, f"{sequence.request_id} holds a slot already"
        sequence.state_slot = self._free.pop()

    def release(self, sequence: Sequence) -> None:
        """Take back the sequence's slot."""
        assert sequence.state_slot is not None, f"{sequence.request_id} holds no slot"
        self._free.append(sequence.state_slot)
        sequence.state_slot = None

    def check_integrity(self, owners: Iterable[Sequence]) -> None:
        """Every slot has exactly one owner. Raises AssertionError."""
        held = [sequence.state_slot for sequence in owners if sequence.state_slot is not None]
        assert sorted(held + self._free) == list(range(self.num_slots)), "state slots lost or owned twice"
