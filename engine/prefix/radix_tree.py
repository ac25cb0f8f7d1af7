"""A radix tree over token ids, whose nodes hold the KV blocks of their tokens.

A node stands for the tokens from the root to its end. It stores the last part of them, its own tokens, and their
blocks. Prompts are compared token by token; there are no hashes to collide. A node exists only if it has a snapshot or
at least two children.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..memory.blocks import BlockManager

Tokens = np.ndarray  # [N] int32


@dataclass(eq=False, repr=False, slots=True, weakref_slot=True)
class Node:
    """The tokens from the root up to `end`. The tokens after the parent's end are the node's own."""

    parent: Node | None  # None = the node is a root
    tokens: Tokens  # the node's own
    end: int
    blocks: list[int]  # blocks of the own tokens; the parent may share the first one
    snapshot: int | None = None  # index of the states after `end` tokens
    rung: int | None = None  # the rung's level, if the snapshot is a rung
    children: dict[int, Node] = field(default_factory=dict)  # by each child's first own token

    @property
    def start(self) -> int:
        return self.end - len(self.tokens)


class RadixTree:
    """A root per salt: prompts of different salts share nothing."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.nodes: OrderedDict[Node, None] = OrderedDict()  # all but the roots, least recently used first
        self._roots: dict[str | None, Node] = {}  # by salt
        self._salts: dict[Node, str | None] = {}  # by root

    def walk(self, tokens: Tokens, salt: str | None) -> tuple[Node | None, int, Node | None]:
        """Follow `tokens` from the root of the salt. Returns (the deepest node whose tokens all agree, the number of
        tokens that agree, the child that agrees with some more of them)."""
        node, at = self._roots.get(salt), 0
        while node is not None and at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                break
            same = common_prefix(child.tokens, tokens[at:])
            at += same
            if same < len(child.tokens):
                return node, at, child
            node = child
        return node, at, None

    def node_at(self, tokens: Tokens, table: list[int], salt: str | None) -> Node:
        """The node that ends with the last of `tokens`; made if there is none. `table`: the blocks of the tokens' keys
        and values."""
        node, at, child = self.walk(tokens, salt)
        if node is None:
            node = self._roots[salt] = Node(None, np.empty(0, dtype=np.int32), 0, [])
            self._salts[node] = salt
        if child is not None:
            node = self._split(child, at)
        return self._add(node, tokens, table) if at < len(tokens) else node

    def touch(self, node: Node) -> None:
        """Make the node the most recently used one."""
        self.nodes.move_to_end(node)

    def leaves(self) -> Iterator[Node]:
        """Nodes without children, least recently used first."""
        return (node for node in self.nodes if not node.children)

    def tidy(self, node: Node) -> None:
        """Remove a node without a snapshot if it is a leaf, and then tidy its parent. Join such a node with its child
        if it has only one."""
        parent = node.parent
        if node.snapshot is not None or len(node.children) > 1:
            return
        if parent is None:
            if not node.children:
                del self._roots[self._salts.pop(node)]
            return
        del self.nodes[node]
        if node.children:
            (child,) = node.children.values()
            self._join(node, child, parent)
            return
        self.blocks.let_go(node.blocks)
        del parent.children[int(node.tokens[0])]
        self.tidy(parent)

    def check_integrity(self) -> None:
        """The tree is whole, and every node has a snapshot or two children. Raises AssertionError."""
        assert {salt: root for root, salt in self._salts.items()} == self._roots, "roots lost"
        found = [node for root in self._roots.values() for node in _below(root)]
        assert set(found) == set(self.nodes) and len(found) == len(self.nodes), "nodes lost"
        for node in found:
            parent, size = node.parent, self.blocks.block_size
            assert parent is not None and parent.end == node.start < node.end
            assert parent.children[int(node.tokens[0])] is node
            assert len(node.blocks) == self.blocks.blocks_for(node.end) - node.start // size
            assert node.snapshot is not None or len(node.children) > 1, "a useless node"

    def _split(self, child: Node, end: int) -> Node:
        """A new node at `end`, between the child and its parent."""
        size, parent = self.blocks.block_size, child.parent
        assert parent is not None
        first = child.start // size
        own = child.blocks[: self.blocks.blocks_for(end) - first]
        rest = child.blocks[end // size - first :]
        node = Node(parent, child.tokens[: end - child.start], end, own)
        if end % size:
            self.blocks.hold(own[-1:])  # a block with tokens of both
        parent.children[int(node.tokens[0])] = node
        child.parent, child.tokens, child.blocks = node, child.tokens[end - child.start :], rest
        node.children[int(child.tokens[0])] = child
        self.nodes[node] = None
        return node

    def _add(self, parent: Node, tokens: Tokens, table: list[int]) -> Node:
        """A new leaf for the tokens after the parent's end."""
        end = len(tokens)
        blocks = table[parent.end // self.blocks.block_size : self.blocks.blocks_for(end)]
        self.blocks.hold(blocks)
        node = Node(parent, tokens[parent.end :].copy(), end, blocks)
        parent.children[int(node.tokens[0])] = node
        self.nodes[node] = None
        return node

    def _join(self, node: Node, child: Node, parent: Node) -> None:
        """Remove the node. Its tokens and blocks go to its only child."""
        kept = child.start // self.blocks.block_size - node.start // self.blocks.block_size
        self.blocks.let_go(node.blocks[kept:])  # the child holds a block with the node's last tokens too
        child.blocks = node.blocks[:kept] + child.blocks
        child.tokens = np.concatenate([node.tokens, child.tokens])
        child.parent = parent
        parent.children[int(child.tokens[0])] = child


def common_prefix(a: Tokens, b: Tokens) -> int:
    """The number of leading tokens that both have in common."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    first = int(different.argmax()) if size else 0
    return first if size and different[first] else size


def path_to(node: Node) -> list[Node]:
    """The nodes from the root, without it, down to `node`."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _below(node: Node) -> Iterator[Node]:
    stack = list(node.children.values())
    while stack:
        found = stack.pop()
        yield found
        stack += found.children.values()
