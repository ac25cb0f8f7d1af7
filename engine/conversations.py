"""Which place of the prefix cache each session id stands for. Torch-free bookkeeping; nothing is kept alive by it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from .prefix_cache import Node, PrefixCache

MAX_KNOWN = 4096  # ids; of more the longest unused is forgotten


@dataclass(slots=True)
class Conversation:
    """The end of its latest answer, or None when the cache has forgotten it, and the salt of its tree."""

    node: Node | None
    salt: str | None


class Conversations:
    """Session ids, least recently used first."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self._known: OrderedDict[str, Conversation] = OrderedDict()

    def note(self, session_id: str, node: Node | None, salt: str | None) -> None:
        """From here on the id stands for the node."""
        self._known[session_id] = Conversation(node, salt)
        self._known.move_to_end(session_id)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        for conversation in self._known.values():  # whose tokens would be kept for nothing
            self._refresh(conversation)

    def find(self, session_id: str) -> Conversation | None:
        conversation = self._known.get(session_id)
        if conversation is not None:
            self._known.move_to_end(session_id)
            self._refresh(conversation)
        return conversation

    def forget(self, session_id: str) -> None:
        self._known.pop(session_id, None)

    def _refresh(self, conversation: Conversation) -> None:
        if conversation.node is not None and not self.cache.has_checkpoint(conversation.node):
            conversation.node = None
