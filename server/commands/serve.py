"""`leyden serve`: start the engine process, serve HTTP, drain on SIGTERM, and end in an error if the engine does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...configs.kubernetes import injected_names
from ...configs.schema import Settings
from ...configs.sources import SettingsError
from ...engine import logs
from ...engine.errors import EngineDeadError
from ...engine.sessions import folder as session_folder
from ..http.app import create_app
from ..http.connection import max_sockets
from ..http.middleware import load_keys
from ..http.starting import refusing
from ..http.trace_export import exporting_tracer
from .banner import banner
from .engine import RunningEngine, running_engine
from .service import Ending, Service

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger("leyden.server")

BACKLOG = 2048  # connections that the kernel holds until they are accepted; uvicorn's default
SPARE_FILES = 256  # open files of this process beside its clients' sockets


def serve(settings: Settings) -> int:
    """Serve until told to stop. Returns 0 after a drain, 1 when the engine died, and 128 plus a signal's number when
    the signal came before the model was loaded.

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
    try:
        async with contextlib.AsyncExitStack() as stack:
            starting = asyncio.ensure_future(stack.enter_async_context(running_engine(settings)))
            try:
                async with refusing(listener, BACKLOG, settings.read_timeout):
                    both: set[asyncio.Future[Any]] = {starting, interrupted}
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if interrupted.done():
                    number = interrupted.result()
                    return Ending(128 + number, f"{signal.Signals(number).name} while the model was loaded")
                engine = await starting
            finally:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            return await _serve_engine(engine, settings, listener, tracer, interrupted)
    except EngineDeadError as error:
        return Ending(1, f"the engine did not start: {error}")


async def _serve_engine(
    engine: RunningEngine,
    settings: Settings,
    listener: socket.socket,
    tracer: Tracer | None,
    interrupted: asyncio.Future[int],
) -> Ending:
    llm = engine.llm
    name = settings.served_model_name or _model_name(settings.model)
    address = _address(*listener.getsockname()[:2])
    app = create_app(llm, settings, model_name=name, tracer=tracer, grammars=engine.grammars)
    text = banner(
        llm.client.info,
        name=name,
        address=address,
        needs_key=_needs_key(settings),
        can_chat=llm.tokenizer.has_chat_template,
        config=settings,
    )
    print(text, flush=True)
    logger.info("ready: %s is served at %s", name, address)
    return await Service(settings, llm.client, app).run(listener, interrupted)


def _first_signal() -> asyncio.Future[int]:
    """A future of the number of the first SIGINT or SIGTERM from now on."""
    loop = asyncio.get_running_loop()
    first: asyncio.Future[int] = loop.create_future()

    def note(number: int) -> None:
        if not first.done():
            first.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, note, number)
    return first


def allow_files(wanted: int) -> None:
    """Raise this process's bound on open files, so that the server refuses a connection too many, not the system."""
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
    """Check the files of keys and sessions before the model is loaded: a wrong path should not cost a minute.

    Raises `ConfigError`.
    """
    load_keys(settings)
    if settings.session_folder is not None:
        session_folder.prepare(settings.session_folder)


def bind(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded: a port in use should not cost a minute."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches off the delay of small packets (Nagle) only for sockets whose protocol is given as TCP. The delay
    # is 40 ms of each answer on a connection that is kept alive.
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
    """A URL that works on this machine, also when every interface is bound."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _model_name(model: str) -> str:
    """A folder's name, or a hub id as it is."""
    return model if not Path(model).exists() else Path(model).resolve().name


def _needs_key(settings: Settings) -> bool:
    return bool(settings.api_key or settings.api_key_file)
