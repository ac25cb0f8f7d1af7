"""The prefix cache: what was computed for earlier prompts and answers, found again by their tokens.

Some nodes of a radix tree hold, beside the KV blocks of their tokens, a *checkpoint*: the recurrent states after
exactly these tokens. Keys and values can be taken up at any token, a state only where one was saved, so every leaf has
a checkpoint, and a sequence resumes at the deepest one on its path.

Nothing here touches the device. What is to be copied is said by the scheduler and done before the next step, in order
and on the stream of the steps, so a checkpoint may be given away while a copy from it is still to be made.
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
    """What the cache knows of a prompt."""

    node: Node | None  # the deepest with a checkpoint
    num_shared: int  # tokens that some earlier prompt or answer began with, too

    @property
    def num_cached(self) -> int:
        return self.node.end if self.node is not None else 0


@dataclass(eq=False, slots=True)
class Hold:
    """Blocks and checkpoints, in the tree or not, that are given to no one else and not written to until `let_go`."""

    blocks: list[int]
    checkpoints: list[int]


class PrefixCache:
    """The tree, and which checkpoints are free.

    Checkpoints 0 .. num_checkpoints - 1 lie on the device, the `num_host_checkpoints` after them in host memory, where
    the least recently used go. One is made only where it saves `min_tokens` more than the one before it.

    *Rungs* are checkpoints on the way of a prompt, where nothing is known to part yet. `num_for_rungs` places on the
    device are theirs alone, and any that are free; a rung takes nobody else's, and gives its own up for another
    checkpoint, beyond those, or for a rung. The one forgotten is the oldest, where each level doubles the age that a
    rung may reach: of those of an old prompt every other one is left, then every fourth. None goes to the host.
    """

    num_for_rungs = 0

    def __init__(
        self, blocks: BlockManager, num_checkpoints: int, num_host_checkpoints: int = 0, min_tokens: int = 1
    ) -> None:
        self.blocks = blocks
        self.tree = RadixTree(blocks)
        self.num_checkpoints = num_checkpoints
        self.num_host_checkpoints = num_host_checkpoints
        self.min_tokens = min_tokens
        self._free = list(range(num_checkpoints - 1, -1, -1))
        self._free_on_host = list(range(num_checkpoints + num_host_checkpoints - 1, num_checkpoints - 1, -1))
        self._holds: list[Hold] = []
        # The nodes with a checkpoint that is no rung, on the device and on the host; those with a rung, by level. Each
        # with the step in which it came there or was last used, and in this order.
        self._with_checkpoint: tuple[OrderedDict[Node, int], ...] = (OrderedDict(), OrderedDict())
        self._rungs: tuple[OrderedDict[Node, int], ...] = tuple(OrderedDict() for _ in range(MAX_LEVEL + 1))
        self._step = 0  # counts those that made rungs
        self.num_given = 0  # times that a node got a checkpoint: as long as it stays, `match` finds nothing better

    @property
    def num_checkpoints_used(self) -> int:
        return self.num_checkpoints - len(self._free)

    @property
    def num_host_checkpoints_used(self) -> int:
        return self.num_host_checkpoints - len(self._free_on_host)

    @property
    def num_rungs(self) -> int:
        return sum(map(len, self._rungs))

    def match(self, tokens: Tokens, salt: str | None = None) -> Match:
        """What is known of `tokens`. Changes nothing."""
        node, at, _ = self.tree.walk(tokens, salt)
        while node is not None and node.checkpoint is None:
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
        """Make a checkpoint after `tokens`, whose keys and values are in the blocks of `table`, if it spares at least
        `min_tokens` (None = the cache's own).

        Returns where the states are to be saved, None when there is no need or no room, and what has to be moved
        before. From here on the cache holds the blocks.
        """
        before = self.match(tokens, salt).node
        if before is not None and before.end == len(tokens) and before.rung is not None:
            self._promote(before)
            return None, []
        while before is not None and (before.checkpoint is None or before.rung is not None):  # rungs are soon forgotten
            before = before.parent
        spared = len(tokens) - (before.end if before is not None else 0)
        if spared < (self.min_tokens if min_tokens is None else min_tokens):
            return None, []
        checkpoint, moves = self._take_checkpoint()
        if checkpoint is None:
            return None, []
        node = self.tree.node_at(tokens, table, salt)
        self._give(node, checkpoint)
        self._touch(node)
        return checkpoint, moves

    def insert_rung(self, tokens: Tokens, table: list[int], salt: str | None, level: int) -> int | None:
        """Make a rung after `tokens`, as `insert` does, where nothing is kept yet and a place is to be had. Returns the
        place, to be written to in the coming step."""
        if self.match(tokens, salt).num_cached == len(tokens):
            return None
        if not self._free:
            victim = self._oldest_rung(spared=self._step)
            if victim is None:
                return None
            self._drop_checkpoint(victim)
        node = self.tree.node_at(tokens, table, salt)
        node.rung = level
        self._give(node, self._free.pop())
        self._touch(node)
        return node.checkpoint

    def next_step(self) -> None:
        """Rungs made from here on are of another step. Those of one step make no room for each other: it writes all of
        them at once."""
        self._step += 1

    def has_checkpoint(self, node: Node) -> bool:
        """Whether the node is still in the tree, with its checkpoint."""
        return node in self.tree.nodes and node.checkpoint is not None

    def hold(self, node: Node, most: int) -> tuple[Tokens, list[int], Hold]:
        """Keep what a node in the tree stands for: (its tokens from the root on, the ends of the `most` deepest
        checkpoints of its path, their checkpoints and the blocks of all the tokens)."""
        path = path_to(node)
        kept = [part for part in path if part.checkpoint is not None][-most:]
        hold = Hold(self.use(node), [part.checkpoint for part in kept if part.checkpoint is not None])
        self.blocks.hold(hold.blocks)
        self._holds.append(hold)
        return np.concatenate([part.tokens for part in path]), [part.end for part in kept], hold

    def take(self, num_blocks: int, num_checkpoints: int) -> tuple[Hold | None, list[Move]]:
        """Free blocks and up to so many checkpoints, at least one, for contents that come from elsewhere. Returns them
        and what has to be moved before they are written to. None when there is no room for the blocks, and then nothing
        was forgotten, or no checkpoint that is not held."""
        if not self.num_checkpoints or not self.make_room(num_blocks):
            return None, []
        hold = Hold(self.blocks.take(num_blocks), [])
        self._holds.append(hold)
        moves: list[Move] = []
        for _ in range(num_checkpoints):
            checkpoint, moved = self._take_checkpoint()
            if checkpoint is not None:
                hold.checkpoints.append(checkpoint)
                moves += moved
        if not hold.checkpoints:
            self.let_go(hold)
            return None, []
        return hold, moves

    def adopt(self, hold: Hold, tokens: Tokens, ends: list[int], salt: str | None = None) -> Node:
        """Put what was taken, and is filled now, into the tree: the keys and values of the tokens are in its blocks,
        the states after the first `end` tokens in the checkpoint of the same place. Lets go of the rest. Returns the
        last end's node."""
        for end, checkpoint in zip(ends, hold.checkpoints, strict=True):
            node = self.tree.node_at(tokens[:end], hold.blocks, salt)
            if node.checkpoint is None:
                self._give(node, checkpoint)
            elif node.rung is not None:  # it has been computed meanwhile
                self._promote(node)
            self._touch(node)
        self.let_go(hold)
        return node

    def let_go(self, hold: Hold) -> None:
        """What is in no use any more is free."""
        self._holds.remove(hold)
        self.blocks.let_go(hold.blocks)
        in_tree = {node.checkpoint for nodes in self._queues for node in nodes}
        for checkpoint in hold.checkpoints:
            if checkpoint not in in_tree:
                self._free_checkpoint(checkpoint)

    def make_room(self, num_blocks: int, keep: Node | None = None) -> bool:
        """Forget leaves, least recently used first, until so many blocks are free. False when that would not be enough;
        then nothing is forgotten."""
        if self.blocks.num_free >= num_blocks:
            return True
        held = {block for hold in self._holds for block in hold.blocks}
        for part in path_to(keep) if keep is not None else ():  # a sequence has all of them but copies of the last ones
            held.update(part.blocks[-1:])
        num_idle = self.blocks.num_cached - sum(not self.blocks.is_used(block) for block in held)
        if self.blocks.num_free + num_idle < num_blocks:
            return False
        while self.blocks.num_free < num_blocks:
            useful = (leaf for leaf in self.tree.leaves() if self._are_idle(leaf.blocks[-2:], held))
            in_the_way = (leaf for leaf in self.tree.leaves() if self._has_idle(leaf, held))
            leaf = next((leaf for leaf in itertools.chain(useful, in_the_way) if leaf is not keep), None)
            assert leaf is not None, "blocks that nobody uses belong to no leaf"
            self._drop_checkpoint(leaf)
        return True

    def clear(self) -> None:
        """Forget everything."""
        for node in [node for nodes in self._queues for node in nodes]:
            self._drop_checkpoint(node)

    def check_integrity(self) -> None:
        """The tree is whole and every checkpoint has one owner. Raises AssertionError."""
        self.tree.check_integrity()
        owned = [node.checkpoint for node in self.tree.nodes if node.checkpoint is not None]
        for nodes, on_host in zip(self._with_checkpoint, (False, True), strict=True):
            known = [n for n in self.tree.nodes if n.checkpoint is not None and n.rung is None]
            assert set(nodes) == {n for n in known if self._is_on_host(n) is on_host}, "checkpoints in another place"
        for level, rungs in enumerate(self._rungs):
            assert set(rungs) == {n for n in self.tree.nodes if n.rung == level}, "rungs in another place"
            assert all(n.checkpoint is not None and not self._is_on_host(n) for n in rungs), "a rung that is none"
            assert list(rungs.values()) == sorted(rungs.values()), "rungs out of order"
        assert len(set(owned)) == len(owned), "a checkpoint of two nodes"
        held = {*owned, *(checkpoint for hold in self._holds for checkpoint in hold.checkpoints)}
        everything = range(self.num_checkpoints + self.num_host_checkpoints)
        assert sorted([*held, *self._free, *self._free_on_host]) == list(everything), "checkpoints lost or owned twice"

    def tables(self) -> Iterator[list[int]]:
        """The blocks that each node holds, and each `Hold`."""
        yield from (node.blocks for node in self.tree.nodes)
        yield from (hold.blocks for hold in self._holds)

    def _take_checkpoint(self) -> tuple[int | None, list[Move]]:
        """A free one on the device that is no rung's alone, if need be after forgetting a rung or sending the least
        recently used of the others to the host."""
        moves: list[Move] = []
        most = self.num_checkpoints - self.num_for_rungs
        while self.num_checkpoints_used - self.num_rungs >= most and self._evict(moves):
            pass
        if not self._free:
            rung = self._oldest_rung()
            if rung is None:
                return None, []
            self._drop_checkpoint(rung)
        return self._free.pop(), moves

    def _evict(self, moves: list[Move]) -> bool:
        """Free the place of the least recently used checkpoint on the device that is no rung. False if none may go."""
        victim = self._least_used(on_host=False)
        if victim is None:
            return False
        if not self.num_host_checkpoints:
            self._drop_checkpoint(victim)
            return True
        if not self._free_on_host:
            oldest = self._least_used(on_host=True)
            if oldest is None:
                return False
            self._drop_checkpoint(oldest)
        taken, moved_to = victim.checkpoint, self._free_on_host.pop()
        assert taken is not None
        del self._with_checkpoint[False][victim]
        self._free.append(taken)
        self._give(victim, moved_to)
        moves.append(Move(taken, moved_to))
        return True

    def _oldest_rung(self, spared: int | None = None) -> Node | None:
        """The rung that has reached most of the age that its level may, but for those of the step `spared`."""
        held = {checkpoint for hold in self._holds for checkpoint in hold.checkpoints}
        oldest = [next((rung for rung in level if rung.checkpoint not in held), None) for level in self._rungs]
        rungs = [rung for rung in oldest if rung is not None and self._queue(rung)[rung] != spared]
        return max(rungs, key=self._share_of_age, default=None)

    def _share_of_age(self, rung: Node) -> float:
        """Steps since the rung was made or used, over the age that a rung of its level may reach."""
        return (self._step - self._queue(rung)[rung] + 1) / (1 << (rung.rung or 0))

    def _promote(self, rung: Node) -> None:
        """The rung is a checkpoint like others from here on, and the one used last."""
        del self._queue(rung)[rung]
        rung.rung = None
        self._queue(rung)[rung] = self._step
        self.tree.touch(rung)

    def _least_used(self, *, on_host: bool) -> Node | None:
        """The node that has waited longest of those whose checkpoint lies there and may be given away."""
        held = {checkpoint for hold in self._holds for checkpoint in hold.checkpoints}
        return next((node for node in self._with_checkpoint[on_host] if node.checkpoint not in held), None)

    @property
    def _queues(self) -> tuple[OrderedDict[Node, int], ...]:
        return (*self._with_checkpoint, *self._rungs)

    def _queue(self, node: Node) -> OrderedDict[Node, int]:
        """The one that a node with a checkpoint stands in."""
        return self._with_checkpoint[self._is_on_host(node)] if node.rung is None else self._rungs[node.rung]

    def _is_on_host(self, node: Node) -> bool:
        return node.checkpoint is not None and node.checkpoint >= self.num_checkpoints

    def _give(self, node: Node, checkpoint: int) -> None:
        """The node has this checkpoint, and had none there."""
        node.checkpoint = checkpoint
        self._queue(node)[node] = self._step
        self.num_given += 1

    def _touch(self, node: Node) -> None:
        """The node, which has a checkpoint, is the one used last."""
        self.tree.touch(node)
        queue = self._queue(node)
        queue[node] = self._step
        queue.move_to_end(node)

    def _are_idle(self, blocks: list[int], held: set[int]) -> bool:
        """Whether nobody but the tree has any of them."""
        return not any(self.blocks.is_used(block) or block in held for block in blocks)

    def _has_idle(self, leaf: Node, held: set[int]) -> bool:
        """Whether something between the root and the leaf would be free without it."""
        return any(self._are_idle([block], held) for part in path_to(leaf) for block in part.blocks)

    def _drop_checkpoint(self, node: Node) -> None:
        """Free the checkpoint, and with it every node that is now of no use."""
        assert node.checkpoint is not None
        if not any(node.checkpoint in hold.checkpoints for hold in self._holds):
            self._free_checkpoint(node.checkpoint)
        del self._queue(node)[node]
        node.checkpoint = node.rung = None
        self.tree.tidy(node)

    def _free_checkpoint(self, checkpoint: int) -> None:
        (self._free if checkpoint < self.num_checkpoints else self._free_on_host).append(checkpoint)
