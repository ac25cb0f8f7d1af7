"""The boundary between requests and sequences: token ids go down, token ids come up."""

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
    """An engine, as the text layer and the server know it.

    A subclass starts the engine, ends it, and carries messages: it sends them by `_send` and calls `_receive` with each
    answer. `EngineClient` sorts the answers to the requests and calls that wait for them.

    info: set once `start` has returned. stats: after the latest step.
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
        self._end: str | None = None  # why requests are refused while the engine still lives

    @property
    def is_healthy(self) -> bool:
        """Whether the engine has started, and neither died nor begun to close."""
        return hasattr(self, "info") and not self._death.done() and not self._is_closing

    async def start(self) -> EngineInfo:
        """Load the model. Raises `ConfigError` (a setting or the checkpoint is wrong) or `EngineDeadError`."""
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
        """Outputs of one sequence; the last one has a finish_reason. Closing the iterator early aborts the sequence.

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
        """Return the reason once the engine has died by itself; an engine that is closed never returns it."""
        return await asyncio.shield(self._death)

    def end_streams(self, reason: str) -> None:
        """Fail every open request and session call, and every later request, with `StoppingError`."""
        self._end = reason
        self._fail_streams(reason, StoppingError)

    async def close(self) -> None:
        """Stop the engine and free its memory. May be called twice."""
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
                    if stream is not None:  # None: the reader has left
                        stream.put(output)
            case SessionDone():
                future = self._calls.get(message.call_id)
                if future is not None and not future.done():  # else the caller has left
                    future.set_result(message)
            case EngineInfo():
                if not self._ready.done():  # the start may have been cancelled
                    self._ready.set_result(message)
            case EngineFailed():
                self._die(message.message, is_user_error=message.is_user_error)

    def _die(self, reason: str, *, is_user_error: bool = False) -> None:
        """Note that the engine is gone: every stream and session call that waits for it fails."""
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
        """Refuse a request that the engine's queue has no room for. The engine checks the same bound, but its refusal
        could come after outputs of the request's other choices."""
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
        """End the engine, in whatever state it is."""

    @abstractmethod
    def _send(self, message: ToEngine) -> None:
        """Hand a message over without waiting."""


def _raise_if_refused(output: StepOutput) -> None:
    """Raise the error that the engine answered in place of tokens."""
    match output.error_code:
        case "queue_full":
            raise QueueFullError(output.error or "the queue is full")
        case "queue_timeout":
            raise QueueTimeoutError(output.error or "the request waited too long")
        case "context_length":
            raise ContextLengthError(output.error or "the request does not fit the context", output.error_param)
        case "invalid":
            raise RequestError(output.error or "the request is invalid", output.error_param)
