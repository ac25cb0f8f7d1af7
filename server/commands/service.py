"""One run of the HTTP server over a running engine: it drains on a signal, and ends when the engine does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Iterator
from typing import NamedTuple

import uvicorn
from fastapi import FastAPI

from ...configs.schema import Settings
from ...engine.boundary.client import EngineClient
from ...engine.messages import EngineStats
from ..http.connection import uvicorn_config

logger = logging.getLogger("leyden.server")


class Ending(NamedTuple):
    """How a run ends, for the shell and for the log."""

    exit_code: int
    reason: str


def _spare_the_garbage_collector() -> None:
    """Exempt all objects of the start from garbage collection. They live until the end, and each full collection that
    visited them stalled every stream for 0.1 s."""
    gc.collect()
    gc.freeze()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: a signal drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Service:
    """The HTTP server over `client`'s engine, from the first connection to the last."""

    def __init__(self, settings: Settings, client: EngineClient, app: FastAPI) -> None:
        self.settings = settings
        self.client = client
        self.app = app
        self.server = _Server(uvicorn_config(app, settings))
        self._ending = Ending(0, "the HTTP server stopped")
        self._draining: asyncio.Task | None = None

    async def run(self, listener: socket.socket, interrupted: asyncio.Future[int] | None = None) -> Ending:
        """Serve until drained, interrupted twice, or without an engine.

        `interrupted`: the future of a signal that may have come before this call.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        if interrupted is not None and interrupted.done():
            self._on_signal(signal.Signals(interrupted.result()).name)
        _spare_the_garbage_collector()
        watchers = [asyncio.create_task(self._watch_engine()), asyncio.create_task(self._log_throughput())]
        try:
            await self.server.serve(sockets=[listener])
        finally:
            for task in watchers:
                task.cancel()
        return self._ending

    def _on_signal(self, name: str) -> None:
        if self._draining is not None:
            logger.warning("%s again: stopping at once", name)
            logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # else a traceback for every stream that is cut off
            self.client.end_streams("the server stopped before the answer was complete")
            self.server.force_exit = True
            self._stop(Ending(0, f"{name} for the second time"))
            return
        self.app.state.draining = True
        open_requests = len(self.server.server_state.tasks)
        limit = self.settings.drain_seconds
        told = "draining after %s; open requests: %d, which may finish within %g s (a second signal stops at once)"
        logger.info(told, name, open_requests, limit)
        self._draining = asyncio.create_task(self._drain(name))

    async def _drain(self, name: str) -> None:
        """Stop when the open requests are done or `drain_seconds` are over. New requests are refused already."""
        limit, reason = self.settings.drain_seconds, f"{name}, and every request was finished"
        deadline = asyncio.get_running_loop().time() + limit
        # uvicorn has no event for the end of its last task.
        while self.server.server_state.tasks and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if open_requests := len(self.server.server_state.tasks):
            logger.warning("drain_seconds (%g) are over; requests cut off: %d", limit, open_requests)
            reason = f"{name}; requests cut off: {open_requests}"
            self.client.end_streams(f"the server stopped before the answer was complete (drain_seconds = {limit:g})")
        self._stop(Ending(0, reason))

    async def _watch_engine(self) -> None:
        reason = await self.client.wait_dead()
        logger.error("%s; stopping", reason)
        self._stop(Ending(1, reason))

    def _stop(self, ending: Ending) -> None:
        """End the run. Of several calls the first tells the ending."""
        if not self.server.should_exit:
            self._ending = ending
        self.server.should_exit = True

    async def _log_throughput(self) -> None:
        """Log a line every `stats_interval` seconds in which the engine made a step."""
        interval = self.settings.stats_interval
        before = self.client.stats
        while interval > 0:
            await asyncio.sleep(interval)
            now = self.client.stats
            if now.steps_total != before.steps_total:
                logger.info(_throughput(before, now, interval, self.client))
            before = now


def _throughput(before: EngineStats, now: EngineStats, seconds: float, client: EngineClient) -> str:
    prompt = (now.prompt_tokens_total - before.prompt_tokens_total) / seconds
    generation = (now.generation_tokens_total - before.generation_tokens_total) / seconds
    return (
        f"running {now.num_running}, waiting {now.num_waiting}; prompt {prompt:.0f} tokens/s, "
        f"generation {generation:.0f} tokens/s; state slots {now.state_slots_used}/{client.info.num_state_slots}, "
        f"KV blocks {now.kv_blocks_used}/{client.info.num_kv_blocks}"
    )
