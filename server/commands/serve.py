"""`leyden serve`: start the engine process, serve HTTP, drain on SIGTERM, and die aloud when the engine does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import uvicorn
from fastapi import FastAPI

from ...configs.kubernetes import injected_names
from ...configs.schema import Settings
from ...configs.sources import SettingsError
from ...engine import logs
from ...engine.async_llm import AsyncLLM
from ...engine.boundary.process_client import ProcessClient
from ...engine.errors import EngineDeadError
from ...engine.messages import EngineInfo, EngineStats
from ...engine.sessions import folder as session_folder
from ...engine.text.grammar import GrammarCompiler
from ...engine.text.tokenizer import Tokenizer
from ..http.app import create_app
from ..http.connection import max_sockets, uvicorn_config
from ..http.middleware import load_keys
from ..http.starting import refusing
from ..http.trace_export import exporting_tracer
from ..parsers.formats import ChatFormat
from .banner import banner

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger("leyden.server")

BACKLOG = 2048  # connections that the kernel holds before they are accepted; uvicorn's own default
SPARE_FILES = 256  # that this process has open beside its clients' sockets


class Ending(NamedTuple):
    """How a run ends, for the shell and for the log."""

    exit_code: int
    reason: str


def serve(settings: Settings) -> int:
    """Serve until told to stop. Returns 0 after a drain, 1 when the engine died, 128 and the signal's number when one
    came before there was anything to drain.

    Raises `SettingsError`, `ConfigError` or `CheckpointError` before anything is served.
    """
    logs.configure(settings.log_level, settings.log_format)
    _tell_of_kubernetes()
    allow_files(2 * max_sockets(settings) + SPARE_FILES)
    listener = bind(settings.host, settings.port)
    try:
        check_files(settings)
        with exporting_tracer(settings.otlp_endpoint) as tracer:
            ending = asyncio.run(_serve(settings, listener, tracer))
    finally:
        listener.close()
    level = logging.ERROR if ending.exit_code == 1 else logging.INFO
    logger.log(level, "ended: %s; exit code %d", ending.reason, ending.exit_code)
    return ending.exit_code


async def _serve(settings: Settings, listener: socket.socket, tracer: Tracer | None) -> Ending:
    interrupted = _first_signal()
    client = ProcessClient(
        settings.engine(),
        step_timeout=settings.step_timeout,
        log_level=settings.log_level,
        log_format=settings.log_format,
    )
    starting = asyncio.create_task(_start(client, settings))
    try:
        async with refusing(listener, BACKLOG, settings.read_timeout):
            both: set[asyncio.Future[Any]] = {starting, interrupted}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if interrupted.done():
            number = interrupted.result()
            return Ending(128 + number, f"{signal.Signals(number).name} while the model was loaded")
        info, tokenizer, grammars = await starting
        name = settings.served_model_name or _model_name(settings.model)
        llm = AsyncLLM(client, tokenizer)
        app = create_app(llm, settings, model_name=name, tracer=tracer, grammars=grammars)
        address = _address(*listener.getsockname()[:2])
        needs_key, can_chat = _needs_key(settings), tokenizer.has_chat_template
        text = banner(info, name=name, address=address, needs_key=needs_key, can_chat=can_chat, config=settings)
        print(text, flush=True)
        logger.info("ready: %s is served at %s", name, address)
        return await Service(settings, client, app).run(listener, interrupted)
    except EngineDeadError as error:
        return Ending(1, f"the engine did not start: {error}")
    finally:
        starting.cancel()
        await client.close()


async def _start(client: ProcessClient, settings: Settings) -> tuple[EngineInfo, Tokenizer, GrammarCompiler]:
    """Both sides take seconds: the engine imports and loads while this process reads the tokenizer."""
    starting = asyncio.create_task(client.start())
    try:
        tokenizer = await asyncio.to_thread(Tokenizer.of, settings.engine())
        ChatFormat.choose(settings, tokenizer)  # what contradicts the template should not cost the loading of a model
        grammars = GrammarCompiler(tokenizer.for_grammars)
        grammars.prepare()
        info = await starting
        await asyncio.to_thread(grammars.wait)
        return info, tokenizer, grammars
    finally:
        starting.cancel()


def _first_signal() -> asyncio.Future[int]:
    """The number of the first SIGINT or SIGTERM from now on, once it has come."""
    loop = asyncio.get_running_loop()
    first: asyncio.Future[int] = loop.create_future()

    def note(number: int) -> None:
        if not first.done():
            first.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, note, number)
    return first


def _spare_the_garbage_collector() -> None:
    """What is imported and loaded by now stays: looking through it again took a tenth of a second each time, of every
    stream."""
    gc.collect()
    gc.freeze()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: a signal drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Service:
    """One run of the HTTP server over a living engine."""

    def __init__(self, settings: Settings, client: ProcessClient, app: FastAPI) -> None:
        self.settings = settings
        self.client = client
        self.app = app
        self.server = _Server(uvicorn_config(app, settings))
        self._ending = Ending(0, "the HTTP server stopped")
        self._draining: asyncio.Task | None = None

    async def run(self, listener: socket.socket, interrupted: asyncio.Future[int] | None = None) -> Ending:
        """Serve until drained, interrupted twice, or bereft of the engine. `interrupted`: a signal that may have come
        before."""
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
            logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # every stream that is cut off would be a traceback
            self.client.end_streams("the server stopped before the answer was complete")
            self.server.force_exit = True
            self._stop(Ending(0, f"{name} for the second time"))
            return
        self.app.state.draining = True
        open_requests = len(self.server.server_state.tasks)
        limit = self.settings.drain_seconds
        logger.info("draining after %s: %d open requests may finish within %g s", name, open_requests, limit)
        self._draining = asyncio.create_task(self._drain(name))

    async def _drain(self, name: str) -> None:
        """New requests are refused already; leave when the open ones are done or out of time."""
        limit, reason = self.settings.drain_seconds, f"{name}, and every request was finished"
        deadline = asyncio.get_running_loop().time() + limit
        # uvicorn's set of tasks has no event to wait for.
        while self.server.server_state.tasks and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if open_requests := len(self.server.server_state.tasks):
            logger.warning("drain_seconds (%g) are over: %d requests are cut off", limit, open_requests)
            reason = f"{name}, and {open_requests} requests were cut off"
            self.client.end_streams(f"the server stopped before the answer was complete (drain_seconds = {limit:g})")
        self._stop(Ending(0, reason))

    async def _watch_engine(self) -> None:
        reason = await self.client.wait_dead()
        logger.error("%s; stopping", reason)
        self._stop(Ending(1, reason))

    def _stop(self, ending: Ending) -> None:
        """The first reason is the one that counts."""
        if not self.server.should_exit:
            self._ending = ending
        self.server.should_exit = True

    async def _log_throughput(self) -> None:
        """A line every few seconds while tokens flow."""
        interval = self.settings.stats_interval
        before = self.client.stats
        while interval > 0:
            await asyncio.sleep(interval)
            now = self.client.stats
            if now.steps_total != before.steps_total:
                logger.info(_throughput(before, now, interval, self.client))
            before = now


def _throughput(before: EngineStats, now: EngineStats, seconds: float, client: ProcessClient) -> str:
    prompt = (now.prompt_tokens_total - before.prompt_tokens_total) / seconds
    generation = (now.generation_tokens_total - before.generation_tokens_total) / seconds
    return (
        f"running {now.num_running}, waiting {now.num_waiting}; prompt {prompt:.0f} tokens/s, "
        f"generation {generation:.0f} tokens/s; state slots {now.state_slots_used}/{client.info.num_state_slots}, "
        f"KV blocks {now.kv_blocks_used}/{client.info.num_kv_blocks}"
    )


def allow_files(wanted: int) -> None:
    """Raise this process's own bound on open files: a socket too many is refused by us, and not by the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        logger.warning("max_connections needs %d open files, the system allows %d; raise ulimit -n", wanted, hard)


def _tell_of_kubernetes() -> None:
    if names := injected_names(os.environ):
        logger.info(
            "%s: Kubernetes sets these for a Service called leyden; they are no settings of this server, and "
            "enableServiceLinks: false leaves them out",
            ", ".join(names),
        )


def check_files(settings: Settings) -> None:
    """What keys and sessions need, before the model is loaded: a wrong path should not cost a minute. Raises
    `ConfigError`."""
    load_keys(settings)
    if settings.session_folder is not None:
        session_folder.prepare(settings.session_folder)


def bind(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded: a port in use should not cost a minute."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol: asyncio asks for that before it switches the delay of small packets off (Nagle), 40 ms of each
    # answer on a connection that is kept alive.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"cannot bind {host}:{port}: {reason}; choose another --host or --port") from None
    return listener


def _address(host: str, port: int) -> str:
    """A URL that works from this machine, also when every interface is bound."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _model_name(model: str) -> str:
    """A folder's name, or a hub id as it is."""
    return model if not Path(model).exists() else Path(model).resolve().name


def _needs_key(settings: Settings) -> bool:
    return bool(settings.api_key or settings.api_key_file)
