"""The client of an engine in a process of its own, so that HTTP and text processing do not slow its steps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

import msgspec
import zmq
import zmq.asyncio

from ...configs.schema import EngineConfig
from ..errors import ConfigError, QueueTimeoutError
from ..logs import LogFormat
from ..messages import EngineInfo, FromEngine, Shutdown, StepOutputs, ToEngine, to_engine
from .client import EngineClient
from .heartbeat import BEAT_SECONDS, Heartbeat

logger = logging.getLogger("leyden.engine")


@contextlib.contextmanager
def _ctrl_c_withheld() -> Iterator[None]:
    """Block SIGINT in this thread, and in a process that is started meanwhile, from its first instruction on.

    Ctrl-C reaches the whole group, and would end the engine with a traceback while it still imports. This thread gets a
    blocked SIGINT at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ProcessClient(EngineClient):
    """The engine in its own process, over a ZeroMQ ipc socket in a private folder."""

    STOP_SECONDS = 5.0
    READS_PER_TURN = 16
    BYTES_PER_TURN = 1 << 18
    # Python's arguments. The socket's address, the parent's id and the log's settings follow.
    # -P: a folder of the working directory, such as "kernels", must not shadow a package.
    ENGINE: tuple[str, ...] = ("-P", "-m", "leyden.engine.boundary.process")

    def __init__(
        self,
        config: EngineConfig,
        *,
        step_timeout: float = 300.0,
        log_level: str = "info",
        log_format: LogFormat = "text",
    ) -> None:
        """`step_timeout`: the engine is killed after so many seconds without a message, or without a step while
        sequences run."""
        super().__init__(config)
        self._heartbeat = Heartbeat(step_timeout)
        self._logging = (log_level, log_format)

    async def start(self) -> EngineInfo:
        info = await super().start()
        self._tasks.append(asyncio.create_task(self._watch_heartbeat()))  # only now: loading may take minutes
        return info

    async def _launch(self) -> None:
        try:
            self._folder = tempfile.mkdtemp(prefix="leyden-")  # mode 0700
        except OSError as error:  # most likely a read-only container without a writable /tmp
            raise ConfigError(
                f"cannot make a temporary folder: {error.strerror}; mount a tmpfs on /tmp, or set TMPDIR to a folder "
                "that can be written"
            ) from None
        address = f"ipc://{self._folder}/engine.sock"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):
            self._socket.setsockopt(option, 0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:  # most likely a path longer than the system allows for a socket
            raise ConfigError(f"cannot open a socket in {self._folder}: {error}; set TMPDIR to a short path") from None
        with _ctrl_c_withheld():
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, *self.ENGINE, address, str(os.getpid()), *self._logging),
                stdin=asyncio.subprocess.PIPE,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(self.config.model_dump_json().encode())
        self._process.stdin.close()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    async def _stop(self) -> None:
        if hasattr(self, "_process"):
            await self._end_process()
        if hasattr(self, "_socket"):
            self._socket.close()
            self._context.term()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _end_process(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._process.returncode is None and hasattr(self, "info") and not self._death.done():
            self._send(Shutdown())
            await self._wait_for_end()
        if self._process.returncode is None:  # the engine hangs, or still loads and reads no messages
            self._process.kill()
            if not await self._wait_for_end():
                logger.error("the engine process (pid %d) survives SIGKILL: a driver holds it", self.pid)

    async def _wait_for_end(self) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), self.STOP_SECONDS)
        return self._process.returncode is not None

    def _send(self, message: ToEngine) -> None:
        self._socket.send(to_engine(message))

    async def _read(self) -> None:
        """Receive messages in batches, so that the outputs for a slow reader merge into one. Yields to the readers
        after each batch."""
        decoder = msgspec.msgpack.Decoder(FromEngine)
        try:
            while True:
                num_bytes = 0
                for _ in range(self.READS_PER_TURN):
                    raw = await self._socket.recv()
                    self._receive(decoder.decode(raw))
                    num_bytes += len(raw)
                    if num_bytes > self.BYTES_PER_TURN:
                        break
                await asyncio.sleep(0)
        except Exception as error:  # without a reader no stream would ever end
            logger.exception("reading from the engine failed")
            self._die(f"the engine process (pid {self._process.pid}) cannot be understood: {error}")

    def _receive(self, message: FromEngine) -> None:
        super()._receive(message)
        if isinstance(message, StepOutputs):
            self._heartbeat.note(message.stats)

    async def _watch_heartbeat(self) -> None:
        """Kill an engine that hangs. While the engine is silent, refuse late requests in its place."""
        tick = min(BEAT_SECONDS, self._heartbeat.step_timeout / 4)
        while not self._heartbeat.has_stopped:
            await asyncio.sleep(tick)
            if self._death.done():
                return
            self._heartbeat.tick(tick)
            if self._heartbeat.is_silent:
                self._refuse_late()
        bound = self._heartbeat.step_timeout
        self._die(f"the engine process (pid {self.pid}) hangs: no step for {bound:g} seconds (setting step_timeout)")
        self._process.kill()

    def _refuse_late(self) -> None:
        now = asyncio.get_running_loop().time()
        for stream in self._streams.values():
            if now >= stream.deadline and not stream.has_left_queue:
                stream.fail(QueueTimeoutError())

    async def _watch(self) -> None:
        code = await self._process.wait()
        await asyncio.sleep(0.1)  # the engine's last message, with a better reason, may still arrive
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        self._die(f"the engine process (pid {self._process.pid}) ended {how}")
