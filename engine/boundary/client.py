"""The client of an engine: the boundary between requests and sequences. Token ids go in both directions."""

from __future__ import annotations

import asyncio
import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator

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
    StepOutputs,
    ToEngine,
)
from ..outputs import StepOutput
from .stream import Stream


class EngineClient(ABC):
    """An engine as the text layer and the server see it.

    A subclass starts and ends the engine, and carries messages: `_send` sends one, and it calls `_receive` with each
    answer. `EngineClient` hands each answer to the request or session call that waits for it.

    info: set once `start` has returned. stats: of the latest step.
    """

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
        self._end: str | None = None  # the reason of `end_streams`; refuses requests while the engine still lives

    @property
    def is_healthy(self) -> bool:
        """Whether the engine has started, and neither died nor begun to close."""
        return hasattr(self, "info") and not self._death.done() and not self._is_closing

    async def start(self) -> EngineInfo:
        """Start the engine and load the model. Raises `ConfigError` if a setting or the checkpoint is wrong, otherwise
        `EngineDeadError`."""
        loop = asyncio.get_running_loop()
        self._ready, self._death = loop.create_future(), loop.create_future()
        try:
            await self._launch()
            self.info = await self._ready
        except BaseException:
            await self.close()
            raise
        return self.info

    async def generate(self, request: AddRequest) -> AsyncGenerator[StepOutput, None]:
        """Yield the outputs of one sequence; the last one has a finish_reason. Closing the iterator early aborts the
        sequence.

        Raises `RequestError`, `QueueFullError` or `QueueTimeoutError` before the first output, `EngineDeadError` or
        `StoppingError` at any time.
        """
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
        """Save, restore or delete a session, or list all. Raises `SessionError`, `EngineDeadError`, `StoppingError`."""
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
        """Wait until the engine dies by itself, and return the reason. Never returns once the engine is closed."""
        return await asyncio.shield(self._death)

    def end_streams(self, reason: str) -> None:
        """Fail every open request and session call, and every later request, with `StoppingError`."""
        self._end = reason
        self._fail_streams(reason, StoppingError)

    async def close(self) -> None:
        """Stop the engine and free its memory. May be called twice."""
        self._is_closing = True
        async with self._closing:  # a second call also waits for the end: its caller may close the event loop after it
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
                    if stream is not None:  # None: the request was cancelled
                        stream.put(output)
            case SessionDone():
                future = self._calls.get(message.call_id)
                if future is not None and not future.done():  # otherwise the call was cancelled
                    future.set_result(message)
            case EngineInfo():
                if not self._ready.done():  # the start may have been cancelled
                    self._ready.set_result(message)
            case EngineFailed():
                self._die(message.message, is_user_error=message.is_user_error)

    def _die(self, reason: str, *, is_user_error: bool = False) -> None:
        """Note that the engine has died, and fail every open stream and session call."""
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
        """Raise `QueueFullError` if the engine's queue has no room. The engine checks the same bound, but its refusal
        could arrive after outputs of the request's other choices."""
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
        """Begin to start the engine. Its `EngineInfo` arrives later, by `_receive`."""

    @abstractmethod
    async def _stop(self) -> None:
        """End the engine, in any state."""

    @abstractmethod
    def _send(self, message: ToEngine) -> None:
        """Send a message without waiting."""


def _raise_if_refused(output: StepOutput) -> None:
    """Raise the error that the output carries, if the engine has refused the request."""
    match output.error_code:
        case "queue_full":
            raise QueueFullError(output.error or "the queue is full")
        case "queue_timeout":
            raise QueueTimeoutError(output.error or "the request waited too long")
        case "context_length":
            raise ContextLengthError(output.error or "the request does not fit the context", output.error_param)
        case "invalid":
            raise RequestError(output.error or "the request is invalid", output.error_param)
