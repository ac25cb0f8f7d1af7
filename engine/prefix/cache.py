"""The prefix cache: states, keys and values of earlier prompts and answers, found again by their tokens.

Some nodes of a radix tree have, beside the KV blocks of their tokens, a *snapshot*: the recurrent states after exactly
these tokens. A sequence can share keys and values up to any token, but a state only where one was saved. So every leaf
has a snapshot, and a sequence resumes at the deepest one on its path.

The cache does not touch the device. Its pool operations run before the next step, in order, on the stream of the steps.
So a snapshot may be given away while a copy from it is still pending.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..memory.blocks import BlockManager
from ..memory.operations import Move
from .queues import SnapshotQueues
from .radix_tree import Node, RadixTree, Tokens, path_to


class Match(NamedTuple):
    """The part of a prompt that is in the cache."""

    node: Node | None  # the deepest node on the prompt's path that has a snapshot
    num_shared: int  # leading tokens that the tree holds; at least `num_cached`

    @property
    def num_cached(self) -> int:
        """Tokens before the place where a sequence can resume."""
        return self.node.end if self.node is not None else 0


@dataclass(eq=False, slots=True)
class Lease:
    """Blocks and snapshots, in the tree or not, that are neither given away nor written to until `let_go`."""

    blocks: list[int]
    snapshots: list[int]


class PrefixCache:
    """The tree, the free snapshots and the leases.

    Snapshots 0 .. num_snapshots - 1 lie on the device. The `num_host_snapshots` after them lie in host memory; the
    least recently used ones move there. A snapshot is made only if it spares `min_tokens` more than the one before it.

    *Rungs* are snapshots that a prompt leaves on its way, at places where no other prompt is known to part from it.
    `num_for_rungs` snapshots on the device are reserved for rungs. Beyond the reserve a rung takes only a free
    snapshot, and gives it up to any snapshot that is no rung. Among themselves the oldest rung is forgotten first
    (`SnapshotQueues`). No rung moves to the host.
    """

    num_for_rungs = 0

    def __init__(
        self, blocks: BlockManager, num_snapshots: int, num_host_snapshots: int = 0, min_tokens: int = 1
    ) -> None:
        self.blocks = blocks
        self.tree = RadixTree(blocks)
        self.num_snapshots = num_snapshots
        self.num_host_snapshots = num_host_snapshots
        self.min_tokens = min_tokens
        self._free = list(range(num_snapshots - 1, -1, -1))
        self._free_on_host = list(range(num_snapshots + num_host_snapshots - 1, num_snapshots - 1, -1))
        self._leases: list[Lease] = []
        self._queues = SnapshotQueues(num_snapshots)
        self.num_given = 0  # times that a node got a snapshot; while unchanged, no `match` finds more than before

    @property
    def num_snapshots_used(self) -> int:
        return self.num_snapshots - len(self._free)

    @property
    def num_host_snapshots_used(self) -> int:
        return self.num_host_snapshots - len(self._free_on_host)

    @property
    def num_rungs(self) -> int:
        return self._queues.num_rungs

    def match(self, tokens: Tokens, salt: str | None = None) -> Match:
        """Find the part of `tokens` that is in the cache. Changes nothing."""
        node, at, _ = self.tree.walk(tokens, salt)
        while node is not None and node.snapshot is None:
            node = node.parent
        return Match(node, at)

    def use(self, node: Node) -> list[int]:
        """Note that a sequence resumes at the node. Returns the blocks of the tokens up to the node's end; the last
        block may be partly filled."""
        self._touch(node)
        table: list[int] = []
        for part in path_to(node):
            del table[part.start // self.blocks.block_size :]
            table += part.blocks
        return table

    def insert(
        self, tokens: Tokens, table: list[int], salt: str | None = None, min_tokens: int | None = None
    ) -> tuple[int | None, list[Move]]:
        """Make a snapshot after `tokens`, if it spares at least `min_tokens` (None = the cache's own). `table`: the
        blocks of the tokens' keys and values, which the cache then holds too.

        Returns the snapshot to save the states to, and the moves that must run before. The snapshot is None if there is
        no need or no room for one.
        """
        before = self.match(tokens, salt).node
        if before is not None and before.end == len(tokens) and before.rung is not None:
            self._promote(before)
            return None, []
        while before is not None and (before.snapshot is None or before.rung is not None):  # a rung may soon be gone
            before = before.parent
        spared = len(tokens) - (before.end if before is not None else 0)
        if spared < (self.min_tokens if min_tokens is None else min_tokens):
            return None, []
        snapshot, moves = self._take_snapshot()
        if snapshot is None:
            return None, []
        node = self.tree.node_at(tokens, table, salt)
        self._give(node, snapshot)
        self._touch(node)
        return snapshot, moves

    def insert_rung(self, tokens: Tokens, table: list[int], salt: str | None, level: int) -> int | None:
        """Make a rung of this level after `tokens`. `table`: as in `insert`.

        Returns the snapshot, which the coming step must write. None if there is one already after these tokens, or if
        neither a snapshot nor an earlier step's rung is to be had.
        """
        if self.match(tokens, salt).num_cached == len(tokens):
            return None
        if not self._free:
            victim = self._queues.oldest_rung(self._leased, spares_this_step=True)
            if victim is None:
                return None
            self._drop_snapshot(victim)
        node = self.tree.node_at(tokens, table, salt)
        node.rung = level
        self._give(node, self._free.pop())
        self._touch(node)
        return node.snapshot

    def next_step(self) -> None:
        """Begin another step that may make rungs. Rungs of one step never replace each other: the step writes all."""
        self._queues.next_step()

    def has_snapshot(self, node: Node) -> bool:
        """Whether the node is still in the tree, with its snapshot."""
        return node in self.tree.nodes and node.snapshot is not None

    def lease(self, node: Node, most: int) -> tuple[Tokens, list[int], Lease]:
        """Lease the path from the root to a node, with the `most` deepest snapshots on it.

        Returns the path's tokens, the end of each of these snapshots, and the lease of all blocks and these snapshots.
        """
        path = path_to(node)
        kept = [part for part in path if part.snapshot is not None][-most:]
        lease = Lease(self.use(node), [part.snapshot for part in kept if part.snapshot is not None])
        self.blocks.hold(lease.blocks)
        self._leases.append(lease)
        return np.concatenate([part.tokens for part in path]), [part.end for part in kept], lease

    def take(self, num_blocks: int, num_snapshots: int) -> tuple[Lease | None, list[Move]]:
        """Lease free blocks, and as many as possible of `num_snapshots` snapshots, to load a session into.

        Returns the lease and the moves that must run before the leased memory is written. The lease is None if there
        are too few blocks, and then the cache is unchanged, or if all snapshots are leased already.
        """
        if not self.num_snapshots or not self.make_room(num_blocks):
            return None, []
        lease = Lease(self.blocks.take(num_blocks), [])
        self._leases.append(lease)
        moves: list[Move] = []
        for _ in range(num_snapshots):
            snapshot, moved = self._take_snapshot()
            if snapshot is not None:
                lease.snapshots.append(snapshot)
                moves += moved
        if not lease.snapshots:
            self.let_go(lease)
            return None, []
        return lease, moves

    def adopt(self, lease: Lease, tokens: Tokens, ends: list[int], salt: str | None = None) -> Node:
        """Put the content of a lease from `take` into the tree, and end the lease. Its blocks hold the keys and values
        of `tokens`, and its snapshots the states after `ends` tokens. Returns the node of the last end."""
        for end, snapshot in zip(ends, lease.snapshots, strict=True):
            node = self.tree.node_at(tokens[:end], lease.blocks, salt)
            if node.snapshot is None:
                self._give(node, snapshot)
            elif node.rung is not None:  # a prompt has left a rung here meanwhile
                self._promote(node)
            self._touch(node)
        self.let_go(lease)
        return node

    def let_go(self, lease: Lease) -> None:
        """End the lease. Its blocks without another holder and its snapshots outside the tree become free."""
        self._leases.remove(lease)
        self.blocks.let_go(lease.blocks)
        in_tree = {node.snapshot for node in self._queues}
        for snapshot in lease.snapshots:
            if snapshot not in in_tree:
                self._free_snapshot(snapshot)

    def make_room(self, num_blocks: int, keep: Node | None = None) -> bool:
        """Remove leaves except `keep`, least recently used first, until `num_blocks` are free. Returns False, and
        removes none, if that would not free enough."""
        if self.blocks.num_free >= num_blocks:
            return True
        held = {block for lease in self._leases for block in lease.blocks}
        for part in path_to(keep) if keep is not None else ():  # a table lists copies of partly filled blocks
            held.update(part.blocks[-1:])
        num_idle = self.blocks.num_cached - sum(not self.blocks.is_used(block) for block in held)
        if self.blocks.num_free + num_idle < num_blocks:
            return False
        while self.blocks.num_free < num_blocks:
            useful = (leaf for leaf in self.tree.leaves() if self._are_idle(leaf.blocks[-2:], held))
            in_the_way = (leaf for leaf in self.tree.leaves() if self._has_idle(leaf, held))
            leaf = next((leaf for leaf in itertools.chain(useful, in_the_way) if leaf is not keep), None)
            assert leaf is not None, "idle blocks belong to no leaf"
            self._drop_snapshot(leaf)
        return True

    def clear(self) -> None:
        """Empty the cache."""
        for node in list(self._queues):
            self._drop_snapshot(node)

    def check_integrity(self) -> None:
        """The tree is whole and every snapshot has one owner. Raises AssertionError."""
        self.tree.check_integrity()
        self._queues.check_integrity(self.tree.nodes)
        owned = [node.snapshot for node in self.tree.nodes if node.snapshot is not None]
        assert len(set(owned)) == len(owned), "a snapshot of two nodes"
        held = {*owned, *self._leased}
        everything = range(self.num_snapshots + self.num_host_snapshots)
        assert sorted([*held, *self._free, *self._free_on_host]) == list(everything), "snapshots lost or owned twice"

    def tables(self) -> Iterator[list[int]]:
        """The blocks of each node and of each lease."""
        yield from (node.blocks for node in self.tree.nodes)
        yield from (lease.blocks for lease in self._leases)

    @property
    def _leased(self) -> set[int]:
        """All leased snapshots."""
        return {snapshot for lease in self._leases for snapshot in lease.snapshots}

    def _take_snapshot(self) -> tuple[int | None, list[Move]]:
        """Free a snapshot on the device outside the rungs' reserve: drop a rung, or move the least recently used other
        snapshot to the host. Returns the free snapshot (None if all are leased) and the moves that must run before."""
        moves: list[Move] = []
        most = self.num_snapshots - self.num_for_rungs
        while self.num_snapshots_used - self.num_rungs >= most and self._evict(moves):
            pass
        if not self._free:
            rung = self._queues.oldest_rung(self._leased)
            if rung is None:
                return None, []
            self._drop_snapshot(rung)
        return self._free.pop(), moves

    def _evict(self, moves: list[Move]) -> bool:
        """Free the least recently used snapshot on the device that is no rung: move it to the host (adds to `moves`),
        or drop it if the host has no snapshots. Returns False if all are leased."""
        victim = self._queues.least_used(self._leased, on_host=False)
        if victim is None:
            return False
        if not self.num_host_snapshots:
            self._drop_snapshot(victim)
            return True
        if not self._free_on_host:
            oldest = self._queues.least_used(self._leased, on_host=True)
            if oldest is None:
                return False
            self._drop_snapshot(oldest)
        taken, moved_to = victim.snapshot, self._free_on_host.pop()
        assert taken is not None
        self._queues.remove(victim)
        self._free.append(taken)
        self._give(victim, moved_to)
        moves.append(Move(taken, moved_to))
        return True

    def _promote(self, rung: Node) -> None:
        self._queues.promote(rung)
        self.tree.touch(rung)

    def _give(self, node: Node, snapshot: int) -> None:
        """Give the snapshot to a node without one."""
        node.snapshot = snapshot
        self._queues.add(node)
        self.num_given += 1

    def _touch(self, node: Node) -> None:
        """Make a node with a snapshot the most recently used one."""
        self.tree.touch(node)
        self._queues.touch(node)

    def _are_idle(self, blocks: list[int], held: set[int]) -> bool:
        """Whether no sequence's table lists any of the blocks, and none is in `held`."""
        return not any(self.blocks.is_used(block) or block in held for block in blocks)

    def _has_idle(self, leaf: Node, held: set[int]) -> bool:
        """Whether some block between the root and the leaf would be free without the tree."""
        return any(self._are_idle([block], held) for part in path_to(leaf) for block in part.blocks)

    def _drop_snapshot(self, node: Node) -> None:
        """Take the node's snapshot away. Removes the nodes that the tree does not need without it."""
        assert node.snapshot is not None
        if node.snapshot not in self._leased:
            self._free_snapshot(node.snapshot)
        self._queues.remove(node)
        node.snapshot = node.rung = None
        self.tree.tidy(node)

    def _free_snapshot(self, snapshot: int) -> None:
        (self._free if snapshot < self.num_snapshots else self._free_on_host).append(snapshot)
