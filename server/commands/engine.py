"""A running engine: what `leyden serve` puts HTTP around, and what any other server can put around it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import NamedTuple

from ...configs.schema import Settings
from ...engine.async_llm import AsyncLLM
from ...engine.boundary.process_client import ProcessClient
from ...engine.text.grammar import GrammarCompiler
from ...engine.text.tokenizer import Tokenizer
from ..parsers.formats import ChatFormat


class RunningEngine(NamedTuple):
    """An engine whose model is loaded, and a compiler of grammars that is ready for `create_app`."""

    llm: AsyncLLM
    grammars: GrammarCompiler


@contextlib.asynccontextmanager
async def running_engine(settings: Settings) -> AsyncIterator[RunningEngine]:
    """Start an engine in a process of its own; stop it at the end, also when the start fails or is cancelled.

    Both processes take seconds: the engine imports and loads while this one reads the tokenizer. Raises `ConfigError`,
    `CheckpointError`, or `EngineDeadError` when the engine ends before the model is loaded.
    """
    client = ProcessClient(
        settings.engine(),
        step_timeout=settings.step_timeout,
        log_level=settings.log_level,
        log_format=settings.log_format,
    )
    starting = asyncio.create_task(client.start())
    try:
        tokenizer = await asyncio.to_thread(Tokenizer.of, settings.engine())
        ChatFormat.choose(settings, tokenizer)  # a setting that contradicts the template ends the start before the load
        grammars = GrammarCompiler(tokenizer.for_grammars)
        grammars.prepare()
        await starting
        await asyncio.to_thread(grammars.wait)
        yield RunningEngine(AsyncLLM(client, tokenizer), grammars)
    finally:
        starting.cancel()
        await client.close()
