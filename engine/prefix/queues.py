"""The order in which the prefix cache forgets snapshots."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Container, Iterator

from .ladder import MAX_LEVEL
from .radix_tree import Node

Queue = OrderedDict[Node, int]  # node -> step in which it came here or was last used; oldest first


class SnapshotQueues:
    """The nodes that have a snapshot, each in one queue: on the device, on the host, or per level of rungs.

    Snapshots 0 .. num_on_device - 1 lie on the device. Each level of rungs doubles the age that a rung may reach, so an
    old prompt keeps every other rung, then every fourth.
    """

    def __init__(self, num_on_device: int) -> None:
        self._num_on_device = num_on_device
        self._others: tuple[Queue, Queue] = (OrderedDict(), OrderedDict())  # snapshots but rungs, (device, host)
        self._rungs: tuple[Queue, ...] = tuple(OrderedDict() for _ in range(MAX_LEVEL + 1))  # by level
        self._step = 0  # counts the steps that made rungs

    def __iter__(self) -> Iterator[Node]:
        return itertools.chain(*self._others, *self._rungs)

    @property
    def num_rungs(self) -> int:
        return sum(map(len, self._rungs))

    def next_step(self) -> None:
        """Begin another step that may make rungs."""
        self._step += 1

    def add(self, node: Node) -> None:
        """Append a node, which has got a snapshot, to the end of its queue."""
        self._queue(node)[node] = self._step

    def remove(self, node: Node) -> None:
        """Remove a node before it loses its snapshot."""
        del self._queue(node)[node]

    def touch(self, node: Node) -> None:
        """Make the node the most recently used one of its queue."""
        queue = self._queue(node)
        queue[node] = self._step
        queue.move_to_end(node)

    def promote(self, rung: Node) -> None:
        """Turn a rung into a snapshot like any other, the most recently used one."""
        self.remove(rung)
        rung.rung = None
        self.add(rung)

    def least_used(self, leased: Container[int | None], *, on_host: bool) -> Node | None:
        """The least recently used node on the device or the host whose snapshot is neither a rung nor `leased`."""
        return next((node for node in self._others[on_host] if node.snapshot not in leased), None)

    def oldest_rung(self, leased: Container[int | None], *, spares_this_step: bool = False) -> Node | None:
        """The rung to forget first: it has the largest `_share_of_age` of the rungs that are not `leased`.
        spares_this_step: leave out rungs that were made or used in this step."""
        oldest = [next((rung for rung in level if rung.snapshot not in leased), None) for level in self._rungs]
        spared = self._step if spares_this_step else None
        rungs = [rung for rung in oldest if rung is not None and self._queue(rung)[rung] != spared]
        return max(rungs, key=self._share_of_age, default=None)

    def check_integrity(self, nodes: Collection[Node]) -> None:
        """Every node of the tree that has a snapshot is in its queue, and no other node is. Raises AssertionError."""
        for queue, on_host in zip(self._others, (False, True), strict=True):
            known = [n for n in nodes if n.snapshot is not None and n.rung is None]
            assert set(queue) == {n for n in known if self._is_on_host(n) is on_host}, "snapshots in another queue"
        for level, rungs in enumerate(self._rungs):
            assert set(rungs) == {n for n in nodes if n.rung == level}, "rungs in another queue"
            assert all(n.snapshot is not None and not self._is_on_host(n) for n in rungs), "a rung without a snapshot"
            assert list(rungs.values()) == sorted(rungs.values()), "rungs out of order"

    def _share_of_age(self, rung: Node) -> float:
        """Steps since the rung was made or used, divided by the age that a rung of its level may reach."""
        return (self._step - self._queue(rung)[rung] + 1) / (1 << (rung.rung or 0))

    def _queue(self, node: Node) -> Queue:
        return self._others[self._is_on_host(node)] if node.rung is None else self._rungs[node.rung]

    def _is_on_host(self, node: Node) -> bool:
        return node.snapshot is not None and node.snapshot >= self._num_on_device
