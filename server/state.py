"""The state of one app, which every route gets as a parameter."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from ..configs.schema import ServerConfig
from ..engine.async_llm import AsyncLLM
from ..engine.messages import EngineInfo
from ..engine.text.grammar import GrammarCompiler
from .errors import overloaded
from .metrics import ServerMetrics
from .parsers.formats import ChatFormat
from .wire.ignored import IgnoredNames, ignored_header
from .wire.token_names import TokenNames

BODY_BYTES_PER_TOKEN = 8  # an id of six digits, a comma and a blank; English text has 4
LEAST_BODY_BYTES = 2_000_000


@dataclass(frozen=True)
class ServerState:
    """The engine, the settings and the counters behind one app.

    `created` is in seconds since 1970. `long_texts` bounds the long texts that are tokenized at once: half of the
    processors are left for other work.
    """

    llm: AsyncLLM
    settings: ServerConfig
    model_name: str
    metrics: ServerMetrics
    created: int
    token_names: TokenNames
    chat_format: ChatFormat
    grammars: GrammarCompiler
    ignored_names: IgnoredNames = field(default_factory=IgnoredNames)
    long_texts: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(max((os.cpu_count() or 1) // 2, 1)))

    def tell_ignored(self, names: list[str]) -> dict[str, str]:
        """The header that names the fields left out of a request. Counts the request; the log tells each name once."""
        if names:
            self.metrics.count_ignored()
            self.ignored_names.tell(names)
        return ignored_header(names)


def max_body_bytes(settings: ServerConfig, info: EngineInfo) -> int:
    """Bound on a request's body. By default a prompt as long as the context fits, as text or as token ids."""
    derived = max(BODY_BYTES_PER_TOKEN * info.max_model_len, LEAST_BODY_BYTES)
    return derived if settings.max_body_bytes is None else settings.max_body_bytes


async def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


async def _ready_state(request: Request) -> ServerState:
    """Raises `ApiError` 503 when the engine is dead or the server is draining."""
    if request.app.state.draining:
        raise overloaded("the server is draining and takes no new requests; retry elsewhere or later")
    state = await _state(request)
    if not state.llm.client.is_healthy:
        raise overloaded("the engine is not running; retry later")
    return state


# The type of a route's parameter that is the app's state. With `ReadyState` the route refuses work that cannot be done.
State = Annotated[ServerState, Depends(_state)]
ReadyState = Annotated[ServerState, Depends(_ready_state)]
