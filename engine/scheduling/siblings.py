"""Several answers to one prompt, which is computed once.

The first sequence, the leader, stops before its prompt's last token and waits there for its siblings. Each sibling
gets a copy of the leader's state and shares its full blocks. Then each sequence feeds the last token itself.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from ..memory.blocks import BlockManager
from ..memory.operations import Fork, OperationQueue
from ..sequence import Sequence

PATIENCE = 2000  # steps that a leader waits for announced siblings; about two seconds if nothing else runs


@dataclass(slots=True)
class _Group:
    """The siblings of one leader."""

    num_announced: int  # siblings that have arrived or will
    members: list[Sequence] = field(default_factory=list)  # siblings that have arrived
    patience: int = PATIENCE  # steps that the leader waits yet


class Siblings:
    """The leaders that have siblings to start, and these siblings."""

    def __init__(self, blocks: BlockManager, operations: OperationQueue) -> None:
        self._blocks = blocks
        self._operations = operations
        self._groups: dict[Sequence, _Group] = {}  # by leader
        self._leaders: dict[Sequence, Sequence] = {}  # sibling -> its leader, until the sibling starts

    def __contains__(self, sequence: Sequence) -> bool:
        """Whether the sequence is a leader whose siblings have not started."""
        return sequence in self._groups

    def add(self, sequence: Sequence, leader: Sequence | None) -> None:
        """Note a new sequence if it announces siblings, or if it is a sibling of `leader`. A sibling whose leader is
        gone or has another prompt is not noted: it computes its prompt itself."""
        request = sequence.request
        if not request.shares_prompt:
            return
        if request.num_siblings and sequence.num_prompt_tokens > 1:
            self._groups[sequence] = _Group(request.num_siblings)
        if leader is None or leader not in self._groups:
            return
        if request.prompt_token_ids == leader.request.prompt_token_ids:
            self._groups[leader].members.append(sequence)
            self._leaders[sequence] = leader

    def remove(self, sequence: Sequence) -> None:
        """Drop a finished sequence."""
        self.disband(sequence)
        leader = self._leaders.pop(sequence, None)
        if leader is not None:
            group = self._groups[leader]
            group.members.remove(sequence)
            group.num_announced -= 1

    def leader(self, sibling: Sequence) -> Sequence | None:
        """The sequence whose state the sibling waits to copy. None if the sequence waits for none."""
        return self._leaders.get(sibling)

    def members(self, leader: Sequence) -> list[Sequence]:
        """The siblings of the leader that have arrived and not started."""
        return self._groups[leader].members if leader in self._groups else []

    def check_integrity(self, alive: Container[Sequence]) -> None:
        """Every leader and sibling is alive, and both tables agree. Raises AssertionError."""
        members = {member: leader for leader, group in self._groups.items() for member in group.members}
        assert members == self._leaders
        assert all(sequence in alive for sequence in (*self._groups, *self._leaders))
        assert all(len(group.members) <= group.num_announced for group in self._groups.values())

    def arrived(self) -> tuple[list[Sequence], set[Sequence]]:
        """The leaders that have reached their prompt's last token, in two groups: (leaders whose siblings can start,
        leaders that wait on). A group can start when it is complete, or when its leader's patience is over. Counts one
        more step of waiting for each leader."""
        done, held = [], set()
        for leader, group in self._groups.items():
            if leader.is_at_last_prompt_token:
                group.patience -= 1
                is_whole = len(group.members) == group.num_announced and all(s.is_ready for s in group.members)
                if is_whole or not group.patience:
                    done.append(leader)
                else:
                    held.add(leader)
        return done, held

    def num_own_blocks(self, leader: Sequence) -> int:
        """The number of blocks that each sibling of the leader needs beside the shared ones."""
        return self._blocks.blocks_for(leader.num_prompt_tokens) - self._num_shared_blocks(leader)

    def take_over(self, sibling: Sequence, leader: Sequence) -> None:
        """Give the sibling, which has a slot, the leader's full blocks and new ones for the rest of the prompt. Adds
        the fork of the state to the pending operations."""
        assert leader.state_slot is not None and sibling.state_slot is not None
        shared = self._num_shared_blocks(leader)
        self._blocks.share(sibling, leader.block_table[:shared].tolist())
        self._blocks.grow(sibling, leader.num_prompt_tokens)
        sibling.num_computed_tokens = leader.num_computed_tokens
        partial = []
        if leader.num_computed_tokens % self._blocks.block_size:
            partial = [(leader.block_table[shared], sibling.block_table[shared])]
        self._operations.add(Fork(leader.state_slot, sibling.state_slot, partial))

    def disband(self, leader: Sequence) -> None:
        """Dissolve the leader's group. A sibling that has not started computes the prompt itself."""
        group = self._groups.pop(leader, None)
        for sibling in group.members if group is not None else ():
            del self._leaders[sibling]

    def _num_shared_blocks(self, leader: Sequence) -> int:
        """The number of full blocks of the leader, which it writes no more."""
        return leader.num_computed_tokens // self._blocks.block_size
