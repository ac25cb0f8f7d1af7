"""The base of the writers of all three generation routes."""

from __future__ import annotations

import time
from typing import Generic, TypeVar

from ..door.validation import Prepared
from ..state import ServerState
from ..wire.requests import GenerationRequest
from .usage import UsageCounter

G = TypeVar("G", bound=GenerationRequest)


class AnswerWriter(Generic[G]):
    """Writes the answer to one request, whole or in chunks. `created` is in seconds since 1970."""

    def __init__(self, kind: str, state: ServerState, prepared: Prepared[G]) -> None:
        """`kind` begins the answer's id, as OpenAI spells it for this route."""
        self.id = f"{kind}{prepared.key}"
        self.created = int(time.time())
        self.state = state
        self.request = prepared.request
        options, thinks = prepared.request.stream_options, prepared.answer.thinks
        self.usage = UsageCounter(prepared.prompts, len(prepared.choices), options, thinks=thinks)
        self._has_begun = [False] * len(prepared.choices)

    def begins(self, index: int) -> bool:
        """Whether choice `index` has not been written yet. From this call on it counts as begun."""
        has_begun, self._has_begun[index] = self._has_begun[index], True
        return not has_begun
