"""The prefix cache: states, keys and values of earlier prompts and answers, found again by their tokens.

Some nodes of a radix tree have, beside the KV blocks of their tokens, a *snapshot*: the recurrent states after exactly
these tokens. A sequence can share keys and values up to any token, but a state only where one was saved. So every leaf
has a snapshot, and a sequence resumes at the deepest one on its path.

Nothing here touches the device. Pool operations run before the next step, in the order in which they were noted, on
the stream of the steps. So a snapshot may be given away while a copy from it is still pending.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..memory.blocks import BlockManager
from ..memory.operations import Move
from .ladder import MAX_LEVEL
from .radix_tree import Node, RadixTree, Tokens, path_to


class Match(NamedTuple):
    """The part of a prompt that the cache knows."""

    node: Node | None  # the deepest one with a snapshot on the prompt's path
    num_shared: int  # leading tokens that some earlier prompt or answer has in common with this one

    @property
    def num_cached(self) -> int:
        return self.node.end if self.node is not None else 0


@dataclass(eq=False, slots=True)
class Lease:
    """Blocks and snapshots, in the tree or not, that no sequence and no node gets or writes to until `let_go`."""

    blocks: list[int]
    snapshots: list[int]


class PrefixCache:
    """The tree, and which snapshots are free.

    Snapshots 0 .. num_snapshots - 1 lie on the device. The `num_host_snapshots` after them lie in host memory, where
    the least recently used ones go. A snapshot is made only where it spares `min_tokens` more than the one before it.

    *Rungs* are snapshots on the way of a prompt, at places where no other prompt is known to part. `num_for_rungs`
    places on the device are reserved for rungs; beyond these a rung takes only a free place. It gives its place up to
    another rung, and outside the reserve to any other snapshot. The oldest rung is forgotten first, where each level
    doubles the age that a rung may reach: an old prompt keeps every other rung, then every fourth. No rung goes to the
    host.
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
        # Nodes whose snapshot is no rung, by place (device, host), and nodes whose snapshot is a rung, by level. The
        # value is the step in which the node came there or was last used; nodes stand in this order.
        self._with_snapshot: tuple[OrderedDict[Node, int], ...] = (OrderedDict(), OrderedDict())
        self._rungs: tuple[OrderedDict[Node, int], ...] = tuple(OrderedDict() for _ in range(MAX_LEVEL + 1))
        self._step = 0  # counts the steps that made rungs
        self.num_given = 0  # times that a node got a snapshot: while it is unchanged, no `match` finds more than before

    @property
    def num_snapshots_used(self) -> int:
        return self.num_snapshots - len(self._free)

    @property
    def num_host_snapshots_used(self) -> int:
        return self.num_host_snapshots - len(self._free_on_host)

    @property
    def num_rungs(self) -> int:
        return sum(map(len, self._rungs))

    def match(self, tokens: Tokens, salt: str | None = None) -> Match:
        """The part of `tokens` that is known. Changes nothing."""
        node, at, _ = self.tree.walk(tokens, salt)
        while node is not None and node.snapshot is None:
            node = node.parent
        return Match(node, at)

    def use(self, node: Node) -> list[int]:
        """Note that a sequence resumes at the node. Returns the blocks of its tokens, the last maybe in part."""
        self._touch(node)
        table: list[int] = []
        for part in path_to(node):
            del table[part.start // self.blocks.block_size :]
            table += part.blocks
        return table

    def insert(
        self, tokens: Tokens, table: list[int], salt: str | None = None, min_tokens: int | None = None
    ) -> tuple[int | None, list[Move]]:
        """Make a snapshot after `tokens`, whose keys and values are in the blocks of `table`, if it spares at least
        `min_tokens` (None = the cache's own).

        Returns where the states are to be saved, None when there is no need or no room, and what has to be moved
        before. From here on the cache holds the blocks.
        """
        before = self.match(tokens, salt).node
        if before is not None and before.end == len(tokens) and before.rung is not None:
            self._promote(before)
            return None, []
        while before is not None and (before.snapshot is None or before.rung is not None):  # rungs are soon forgotten
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
        """Make a rung after `tokens`, as `insert` does, where nothing is kept yet and a place is to be had. Returns the
        place, to be written to in the coming step."""
        if self.match(tokens, salt).num_cached == len(tokens):
            return None
        if not self._free:
            victim = self._oldest_rung(spared=self._step)
            if victim is None:
                return None
            self._drop_snapshot(victim)
        node = self.tree.node_at(tokens, table, salt)
        node.rung = level
        self._give(node, self._free.pop())
        self._touch(node)
        return node.snapshot

    def next_step(self) -> None:
        """Begin another step. Rungs of one step make no room for each other, because the step writes them all at
        once."""
        self._step += 1

    def has_snapshot(self, node: Node) -> bool:
        """Whether the node is still in the tree, with its snapshot."""
        return node in self.tree.nodes and node.snapshot is not None

    def lease(self, node: Node, most: int) -> tuple[Tokens, list[int], Lease]:
        """Lease the path to a node of the tree. Returns its tokens from the root on, the ends of the `most` deepest
        snapshots on the path, and a lease of these snapshots and of the blocks of all the tokens."""
        path = path_to(node)
        kept = [part for part in path if part.snapshot is not None][-most:]
        lease = Lease(self.use(node), [part.snapshot for part in kept if part.snapshot is not None])
        self.blocks.hold(lease.blocks)
        self._leases.append(lease)
        return np.concatenate([part.tokens for part in path]), [part.end for part in kept], lease

    def take(self, num_blocks: int, num_snapshots: int) -> tuple[Lease | None, list[Move]]:
        """Lease free blocks, and as many as possible of `num_snapshots` snapshots, for contents from outside.

        Returns the lease and the moves that must run before anything is written to it. The lease is None where the
        blocks find no room, and then nothing was forgotten, or where every snapshot is leased already.
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
        """Put a lease that `take` gave, and that is filled now, into the tree: its blocks hold the tokens' keys and
        values, and each of its snapshots the states after as many tokens as `ends` says. Ends the lease. Returns the
        last end's node."""
        for end, snapshot in zip(ends, lease.snapshots, strict=True):
            node = self.tree.node_at(tokens[:end], lease.blocks, salt)
            if node.snapshot is None:
                self._give(node, snapshot)
            elif node.rung is not None:  # a prompt has computed it meanwhile
                self._promote(node)
            self._touch(node)
        self.let_go(lease)
        return node

    def let_go(self, lease: Lease) -> None:
        """End the lease. Blocks without another holder and snapshots outside the tree are free again."""
        self._leases.remove(lease)
        self.blocks.let_go(lease.blocks)
        in_tree = {node.snapshot for nodes in self._queues for node in nodes}
        for snapshot in lease.snapshots:
            if snapshot not in in_tree:
                self._free_snapshot(snapshot)

    def make_room(self, num_blocks: int, keep: Node | None = None) -> bool:
        """Forget leaves but `keep`, least recently used first, until `num_blocks` are free. False, and nothing is
        forgotten, when that would not be enough."""
        if self.blocks.num_free >= num_blocks:
            return True
        held = {block for lease in self._leases for block in lease.blocks}
        for part in path_to(keep) if keep is not None else ():  # a sequence has all of them but copies of the last ones
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
        """Forget everything."""
        for node in [node for nodes in self._queues for node in nodes]:
            self._drop_snapshot(node)

    def check_integrity(self) -> None:
        """The tree is whole and every snapshot has one owner. Raises AssertionError."""
        self.tree.check_integrity()
        owned = [node.snapshot for node in self.tree.nodes if node.snapshot is not None]
        for nodes, on_host in zip(self._with_snapshot, (False, True), strict=True):
            known = [n for n in self.tree.nodes if n.snapshot is not None and n.rung is None]
            assert set(nodes) == {n for n in known if self._is_on_host(n) is on_host}, "snapshots in another place"
        for level, rungs in enumerate(self._rungs):
            assert set(rungs) == {n for n in self.tree.nodes if n.rung == level}, "rungs in another place"
            assert all(n.snapshot is not None and not self._is_on_host(n) for n in rungs), "a rung that is none"
            assert list(rungs.values()) == sorted(rungs.values()), "rungs out of order"
        assert len(set(owned)) == len(owned), "a snapshot of two nodes"
        held = {*owned, *(snapshot for lease in self._leases for snapshot in lease.snapshots)}
        everything = range(self.num_snapshots + self.num_host_snapshots)
        assert sorted([*held, *self._free, *self._free_on_host]) == list(everything), "snapshots lost or owned twice"

    def tables(self) -> Iterator[list[int]]:
        """The blocks of each node and of each lease."""
        yield from (node.blocks for node in self.tree.nodes)
        yield from (lease.blocks for lease in self._leases)

    def _take_snapshot(self) -> tuple[int | None, list[Move]]:
        """A free snapshot on the device outside the rungs' reserve, and the moves that free it: a rung is forgotten, or
        the least recently used other snapshot goes to the host. None when all are leased."""
        moves: list[Move] = []
        most = self.num_snapshots - self.num_for_rungs
        while self.num_snapshots_used - self.num_rungs >= most and self._evict(moves):
            pass
        if not self._free:
            rung = self._oldest_rung()
            if rung is None:
                return None, []
            self._drop_snapshot(rung)
        return self._free.pop(), moves

    def _evict(self, moves: list[Move]) -> bool:
        """Free the place of the least recently used snapshot on the device that is no rung. False if none may go."""
        victim = self._least_used(on_host=False)
        if victim is None:
            return False
        if not self.num_host_snapshots:
            self._drop_snapshot(victim)
            return True
        if not self._free_on_host:
            oldest = self._least_used(on_host=True)
            if oldest is None:
                return False
            self._drop_snapshot(oldest)
        taken, moved_to = victim.snapshot, self._free_on_host.pop()
        assert taken is not None
        del self._with_snapshot[False][victim]
        self._free.append(taken)
        self._give(victim, moved_to)
        moves.append(Move(taken, moved_to))
        return True

    def _oldest_rung(self, spared: int | None = None) -> Node | None:
        """The rung with the largest `_share_of_age`, not counting rungs made or used in the step `spared`."""
        held = {snapshot for lease in self._leases for snapshot in lease.snapshots}
        oldest = [next((rung for rung in level if rung.snapshot not in held), None) for level in self._rungs]
        rungs = [rung for rung in oldest if rung is not None and self._queue(rung)[rung] != spared]
        return max(rungs, key=self._share_of_age, default=None)

    def _share_of_age(self, rung: Node) -> float:
        """Steps since the rung was made or used, over the age that a rung of its level may reach."""
        return (self._step - self._queue(rung)[rung] + 1) / (1 << (rung.rung or 0))

    def _promote(self, rung: Node) -> None:
        """The rung is a snapshot like others from here on, and the one used last."""
        del self._queue(rung)[rung]
        rung.rung = None
        self._queue(rung)[rung] = self._step
        self.tree.touch(rung)

    def _least_used(self, *, on_host: bool) -> Node | None:
        """The least recently used node whose snapshot lies there and is not leased."""
        held = {snapshot for lease in self._leases for snapshot in lease.snapshots}
        return next((node for node in self._with_snapshot[on_host] if node.snapshot not in held), None)

    @property
    def _queues(self) -> tuple[OrderedDict[Node, int], ...]:
        return (*self._with_snapshot, *self._rungs)

    def _queue(self, node: Node) -> OrderedDict[Node, int]:
        """The queue of a node with a snapshot."""
        return self._with_snapshot[self._is_on_host(node)] if node.rung is None else self._rungs[node.rung]

    def _is_on_host(self, node: Node) -> bool:
        return node.snapshot is not None and node.snapshot >= self.num_snapshots

    def _give(self, node: Node, snapshot: int) -> None:
        """Give a node that stands in no queue this snapshot."""
        node.snapshot = snapshot
        self._queue(node)[node] = self._step
        self.num_given += 1

    def _touch(self, node: Node) -> None:
        """The node, which has a snapshot, is the one used last."""
        self.tree.touch(node)
        queue = self._queue(node)
        queue[node] = self._step
        queue.move_to_end(node)

    def _are_idle(self, blocks: list[int], held: set[int]) -> bool:
        """Whether no sequence and no lease holds any of these blocks."""
        return not any(self.blocks.is_used(block) or block in held for block in blocks)

    def _has_idle(self, leaf: Node, held: set[int]) -> bool:
        """Whether some block between the root and the leaf would be free without the tree."""
        return any(self._are_idle([block], held) for part in path_to(leaf) for block in part.blocks)

    def _drop_snapshot(self, node: Node) -> None:
        """Take the node's snapshot away, and remove the nodes that are useless without it."""
        assert node.snapshot is not None
        if not any(node.snapshot in lease.snapshots for lease in self._leases):
            self._free_snapshot(node.snapshot)
        del self._queue(node)[node]
        node.snapshot = node.rung = None
        self.tree.tidy(node)

    def _free_snapshot(self, snapshot: int) -> None:
        (self._free if snapshot < self.num_snapshots else self._free_on_host).append(snapshot)
