"""Several answers to one prompt: it is computed once.

The first sequence, the leader, stops before its prompt's last token. Its siblings wait for that, take over its state
and share its blocks, and all go on from there, each for itself.
"""

from __future__ import annotations

from ..memory.blocks import BlockManager
from ..memory.operations import Fork
from ..sequence import Sequence

PATIENCE = 2000  # steps, two seconds where nothing else runs, that a sequence waits for siblings that were announced


class Siblings:
    """The sequences that lead others, and the siblings that they wait for."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._leaders: dict[Sequence, int] = {}  # siblings are still to copy from them; steps they may wait for these

    def __contains__(self, sequence: Sequence) -> bool:
        """Whether siblings may still come to copy what the sequence computes."""
        return sequence in self._leaders

    def add(self, sequence: Sequence) -> None:
        """Note a sequence that announces siblings, or is one."""
        if sequence.num_siblings and sequence.num_prompt_tokens > 1:
            self._leaders[sequence] = PATIENCE
        if sequence.leader is not None:
            sequence.leader.siblings.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is gone."""
        self.disband(sequence)
        if sequence.leader is not None:
            sequence.leader.siblings.remove(sequence)
            sequence.leader.num_siblings -= 1

    def arrived(self) -> tuple[list[Sequence], set[Sequence]]:
        """Leaders before their prompt's last token: (those whose siblings are all there, or who wait no longer; those
        that go on waiting)."""
        done, held = [], set()
        for leader in [leader for leader in self._leaders if leader.is_at_last_prompt_token]:
            self._leaders[leader] -= 1
            is_whole = len(leader.siblings) == leader.num_siblings and all(s.is_ready for s in leader.siblings)
            if is_whole or not self._leaders[leader]:
                done.append(leader)
            else:
                held.add(leader)
        return done, held

    def num_own_blocks(self, leader: Sequence) -> int:
        """Blocks that each sibling of such a leader needs beside those that it shares."""
        return self._blocks.blocks_for(leader.num_prompt_tokens) - self._num_shared_blocks(leader)

    def take_over(self, sibling: Sequence, leader: Sequence) -> Fork:
        """Give the sibling, which has a slot, the leader's blocks and its own. Returns what is to be copied."""
        assert leader.state_slot is not None and sibling.state_slot is not None
        shared = self._num_shared_blocks(leader)
        self._blocks.share(sibling, leader.block_table[:shared].tolist())
        self._blocks.grow(sibling, leader.num_prompt_tokens)
        sibling.num_computed_tokens = leader.num_computed_tokens
        partial = []
        if leader.num_computed_tokens % self._blocks.block_size:
            partial = [(leader.block_table[shared], sibling.block_table[shared])]
        return Fork(leader.state_slot, sibling.state_slot, partial)

    def disband(self, leader: Sequence) -> None:
        """End the wait: each sequence goes on by itself, a sibling that has not started computes the prompt."""
        self._leaders.pop(leader, None)
        for sibling in leader.siblings:
            sibling.leader = None
        leader.siblings = []

    def _num_shared_blocks(self, leader: Sequence) -> int:
        """Blocks that the leader has filled, and writes no more."""
        return leader.num_computed_tokens // self._blocks.block_size
