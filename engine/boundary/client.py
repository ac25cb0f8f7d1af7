"""The boundary between requests and sequences: token ids go down, token ids come up.

`InProcessClient` runs the engine in a thread (tests, notebooks), `ProcessClient` in a process of its own (serving), so
that HTTP and text never slow a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Protocol

from ...configs.schema import EngineConfig
from ..errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    SessionError,
    StoppingError,
)
from ..messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineInfo,
    EngineStats,
    FromEngine,
    SessionAction,
    SessionCall,
    SessionDone,
    Shutdown,
    StepOutputs,
    ToEngine,
)
from ..outputs import StepOutput

logger = logging.getLogger("leyden.engine")

StreamFailure = EngineDeadError | StoppingError | QueueTimeoutError


class EngineClient(Protocol):
    """What the text layer and the server know of an engine."""

    info: EngineInfo  # once started
    stats: EngineStats  # after the latest step

    @property
    def is_healthy(self) -> bool:
        """Started, and not dead."""

    async def start(self) -> EngineInfo:
        """Load the model. Raises `ConfigError` (a setting or the checkpoint is wrong) or `EngineDeadError`."""

    def generate(self, request: AddRequest) -> AsyncIterator[StepOutput]:
        """Outputs of one sequence; the last one has a finish_reason.

        Raises `RequestError`, `QueueFullError` or `QueueTimeoutError` before the first output, `EngineDeadError` at any
        time. Closing the iterator early aborts the sequence.
        """

    async def call_session(self, action: SessionAction, session_id: str = "") -> SessionDone:
        """Save, restore or delete a session, or list them. Raises `SessionError` or `EngineDeadError`."""

    async def wait_dead(self) -> str:
        """Returns why, when the engine dies by itself; never otherwise."""

    def end_streams(self, reason: str) -> None:
        """Fail every open stream, and those to come, with `StoppingError`."""

    async def close(self) -> None:
        """Stop the engine and free what it holds. May be called twice."""


class Stream:
    """One sequence's outputs on their way to its reader, which pulls at its own pace.

    Outputs that have piled up are one: a reader that falls behind gets fewer and longer ones, and what waits here is
    never more than the ids (and log-probabilities) of one answer. Nothing waits for company: the first goes at once.
    """

    def __init__(self, deadline: float = math.inf, leader: Stream | None = None) -> None:
        self.deadline = deadline  # of its start, on the event loop's clock
        self.leader = leader  # whose prompt it copies
        self.is_started = False
        self._outputs: list[StepOutput] = []  # more than one only when the last is a failure
        self._failure: StreamFailure | None = None
        self._arrival: asyncio.Future[None] | None = None

    def put(self, output: StepOutput) -> None:
        if self._outputs and not output.is_failure:
            self._outputs[-1].extend(output)
        else:
            self._outputs.append(output)
        self._wake()

    @property
    def has_left_queue(self) -> bool:
        """Its prompt is being computed, for itself or for its leader."""
        return self.is_started or (self.leader is not None and self.leader.is_started)

    def fail(self, error: StreamFailure) -> None:
        """Nothing more will come."""
        self._failure = error
        self._wake()

    async def get(self) -> StepOutput:
        """All that is there. Raises what the stream has failed with once there is nothing left."""
        if not self._outputs and self._failure is None:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        if self._outputs:
            return self._outputs.pop(0)
        assert self._failure is not None
        raise self._failure

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class StreamingClient(ABC):
    """Sorts the engine's messages to the requests that wait for them."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.info: EngineInfo
        self.stats = EngineStats()
        self._streams: dict[str, Stream] = {}
        self._calls: dict[str, asyncio.Future[SessionDone]] = {}
        self._ready: asyncio.Future[EngineInfo]
        self._death: asyncio.Future[str]
        self._is_closing = self._is_closed = False
        self._closing = asyncio.Lock()
        self._end: str | None = None  # why nothing more is served, while the engine lives

    @property
    def is_healthy(self) -> bool:
        return hasattr(self, "info") and not self._death.done() and not self._is_closing

    async def start(self) -> EngineInfo:
        loop = asyncio.get_running_loop()
        self._ready, self._death = loop.create_future(), loop.create_future()
        try:
            await self._launch()
            self.info = await self._ready
        except BaseException:
            await self.close()
            raise
        return self.info

    async def generate(self, request: AddRequest) -> AsyncIterator[StepOutput]:
        if not self.is_healthy:
            raise EngineDeadError(self._reason())
        if self._end is not None:
            raise StoppingError(self._end)
        if request.request_id in self._streams:
            raise RequestError(f"request id {request.request_id!r} is in use", "request_id")
        self._check_room()
        stream = self._streams[request.request_id] = self._make_stream(request)
        is_finished = False
        try:
            self._send(request)
            while not is_finished:
                output = await stream.get()
                is_finished = output.finish_reason is not None
                _raise_if_refused(output)
                yield output
        finally:
            del self._streams[request.request_id]
            if not is_finished and self.is_healthy:
                self._send(AbortRequest(request.request_id))

    def _make_stream(self, request: AddRequest) -> Stream:
        limit = request.max_queue_seconds
        deadline = math.inf if limit is None else asyncio.get_running_loop().time() + limit
        leader = None if request.sibling_of is None else self._streams.get(request.sibling_of)
        return Stream(deadline, leader)

    async def call_session(self, action: SessionAction, session_id: str = "") -> SessionDone:
        if not self.is_healthy:
            raise EngineDeadError(self._reason())
        call_id = uuid.uuid4().hex
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(SessionCall(call_id, action, session_id))
            done = await future
        finally:
            del self._calls[call_id]
        if done.error_code is not None:
            raise SessionError(done.error or "the session call failed", done.error_code)
        return done

    async def wait_dead(self) -> str:
        return await asyncio.shield(self._death)

    def end_streams(self, reason: str) -> None:
        """Fail all that waits for the engine, and what is still to come, with `StoppingError`."""
        self._end = reason
        self._fail_streams(reason, StoppingError)

    async def close(self) -> None:
        self._is_closing = True
        async with self._closing:  # a second call returns when all is closed, too: its caller may end the event loop
            if not self._is_closed:
                await self._stop()
                self._fail_streams("the server is shutting down")
                self._is_closed = True

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                self.stats = message.stats
                for request_id in message.started:
                    if (started := self._streams.get(request_id)) is not None:
                        started.is_started = True
                for output in message.outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None:  # its reader may have left
                        stream.put(output)
            case SessionDone():
                future = self._calls.get(message.call_id)
                if future is not None and not future.done():  # its caller may have left
                    future.set_result(message)
            case EngineInfo():
                if not self._ready.done():  # the start may have been cancelled
                    self._ready.set_result(message)
            case EngineFailed():
                self._die(message.message, is_user_error=message.is_user_error)

    def _die(self, reason: str, *, is_user_error: bool = False) -> None:
        """The engine is gone: every stream and call that waits for it fails."""
        if self._is_closing or self._death.done():
            return
        self._death.set_result(reason)
        if not self._ready.done():
            self._ready.set_exception(ConfigError(reason) if is_user_error else EngineDeadError(reason))
        self._fail_streams(reason)

    def _fail_streams(self, reason: str, kind: type[EngineDeadError | StoppingError] = EngineDeadError) -> None:
        for stream in self._streams.values():
            stream.fail(kind(reason))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(kind(reason))

    def _check_room(self) -> None:
        """The queue's bound, known here too, so that a refusal comes before any output of a request's other choices."""
        bound = self.info.num_state_slots + self.info.max_waiting
        if len(self._streams) >= bound:
            raise QueueFullError(
                f"{len(self._streams)} sequences are running or waiting, and no more than {bound} may "
                f"(max_num_seqs + max_waiting); try again later"
            )

    def _reason(self) -> str:
        if hasattr(self, "_death") and self._death.done():
            return f"the engine is dead: {self._death.result()}"
        return "the engine is not running"

    @abstractmethod
    async def _launch(self) -> None:
        """Begin to start the engine; its `EngineInfo` arrives later."""

    @abstractmethod
    async def _stop(self) -> None:
        """End the engine, whatever state it is in."""

    @abstractmethod
    def _send(self, message: ToEngine) -> None:
        """Hand a message over without waiting."""


class InProcessClient(StreamingClient):
    """The engine in a thread of this process."""

    async def _launch(self) -> None:
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="leyden-engine", daemon=True)
        self._thread.start()

    async def _stop(self) -> None:
        if hasattr(self, "_thread"):
            self._inbox.put(Shutdown())
            await asyncio.to_thread(self._thread.join)

    def _send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def _run(self) -> None:
        from ..core import EngineCore
        from ..errors import LeydenError
        from .loop import run_loop

        try:
            core = EngineCore(self.config, progress=False)
            self._post(core.info())
            run_loop(core, self._take, self._post)
        except LeydenError as error:
            self._post(EngineFailed(str(error), is_user_error=True))
        except Exception as error:
            logger.exception("the engine failed")
            self._post(EngineFailed(f"{type(error).__name__}: {error}"))

    def _take(self, wait_seconds: float) -> list[ToEngine]:
        messages = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._inbox.get(timeout=wait_seconds))
            while True:
                messages.append(self._inbox.get_nowait())
        return messages

    def _post(self, message: FromEngine) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may have been closed under us
            self._loop.call_soon_threadsafe(self._receive, message)


def _raise_if_refused(output: StepOutput) -> None:
    """Raise what the engine answered instead of tokens."""
    match output.error_code:
        case "queue_full":
            raise QueueFullError(output.error or "the queue is full")
        case "queue_timeout":
            raise QueueTimeoutError(output.error or "the request waited too long")
        case "context_length":
            raise ContextLengthError(output.error or "the request does not fit the context", output.error_param)
        case "invalid":
            raise RequestError(output.error or "the request is invalid", output.error_param)
