"""The node of the prefix cache per session id: the end of the session's latest answer. It keeps no node alive."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass

from .cache import PrefixCache
from .radix_tree import Node

MAX_KNOWN = 4096  # session ids; beyond it the least recently used one is forgotten


@dataclass(frozen=True, slots=True)
class Conversation:
    """A session's latest answer in the prefix cache."""

    node: Node | None  # the answer's end; None = the cache has dropped it
    salt: str | None  # the `cache_salt` of the session's requests


class Conversations:
    """The known session ids, least recently used first."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self._known: OrderedDict[str, tuple[weakref.ref[Node] | None, str | None]] = OrderedDict()

    def note(self, session_id: str, node: Node | None, salt: str | None) -> None:
        """Set the session's node."""
        self._known[session_id] = (None if node is None else weakref.ref(node), salt)
        self._known.move_to_end(session_id)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def find(self, session_id: str) -> Conversation | None:
        """The session's latest answer; None if the id is unknown."""
        if session_id not in self._known:
            return None
        self._known.move_to_end(session_id)
        found, salt = self._known[session_id]
        node = None if found is None else found()
        return Conversation(node if node is not None and self.cache.has_snapshot(node) else None, salt)

    def forget(self, session_id: str) -> None:
        self._known.pop(session_id, None)
