"""Several answers to one prompt: it is computed once.

The first sequence, the leader, stops before its prompt's last token. Its siblings wait for that, take over its state
and share its blocks, and all go on from there, each for itself.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from ..memory.blocks import BlockManager
from ..memory.operations import Fork, OperationQueue
from ..sequence import Sequence

PATIENCE = 2000  # steps, two seconds where nothing else runs, that a sequence waits for siblings that were announced


@dataclass(slots=True)
class _Group:
    """A leader's siblings: how many are still to come or here, those that are here, and how many steps it waits."""

    num_announced: int
    members: list[Sequence] = field(default_factory=list)
    patience: int = PATIENCE


class Siblings:
    """The sequences that lead others, and the siblings that they wait for."""

    def __init__(self, blocks: BlockManager, operations: OperationQueue) -> None:
        self._blocks = blocks
        self._operations = operations
        self._groups: dict[Sequence, _Group] = {}  # by leader
        self._leaders: dict[Sequence, Sequence] = {}  # of each sibling, until it starts

    def __contains__(self, sequence: Sequence) -> bool:
        """Whether siblings may still come to copy what the sequence computes."""
        return sequence in self._groups

    def add(self, sequence: Sequence, leader: Sequence | None) -> None:
        """Note a sequence that announces siblings, or names `leader` as the one whose prompt it shares. One that cannot
        copy what its leader computes goes its own way."""
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
        """The sequence is gone."""
        self.disband(sequence)
        leader = self._leaders.pop(sequence, None)
        if leader is not None:
            group = self._groups[leader]
            group.members.remove(sequence)
            group.num_announced -= 1

    def leader(self, sibling: Sequence) -> Sequence | None:
        """The sequence whose computed tokens this one waits to copy, or None."""
        return self._leaders.get(sibling)

    def members(self, leader: Sequence) -> list[Sequence]:
        """The siblings that have come to copy what the sequence computes."""
        return self._groups[leader].members if leader in self._groups else []

    def check_integrity(self, alive: Container[Sequence]) -> None:
        """No sequence that is gone leads or waits. Raises AssertionError."""
        members = {member: leader for leader, group in self._groups.items() for member in group.members}
        assert members == self._leaders
        assert all(sequence in alive for sequence in (*self._groups, *self._leaders))
        assert all(len(group.members) <= group.num_announced for group in self._groups.values())

    def arrived(self) -> tuple[list[Sequence], set[Sequence]]:
        """Leaders before their prompt's last token: (those whose siblings have all come, or that wait no longer; those
        that go on waiting)."""
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
        """Blocks that each sibling of such a leader needs beside those that it shares."""
        return self._blocks.blocks_for(leader.num_prompt_tokens) - self._num_shared_blocks(leader)

    def take_over(self, sibling: Sequence, leader: Sequence) -> None:
        """Give the sibling, which has a slot, the leader's blocks and blocks of its own, and note the fork."""
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
        """End the wait: each sequence goes on by itself, a sibling that has not started computes the prompt."""
        group = self._groups.pop(leader, None)
        for sibling in group.members if group is not None else ():
            del self._leaders[sibling]

    def _num_shared_blocks(self, leader: Sequence) -> int:
        """Blocks that the leader has filled, and writes no more."""
        return leader.num_computed_tokens // self._blocks.block_size
