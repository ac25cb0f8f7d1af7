"""The engine as a process of its own. It reads its configuration as JSON from stdin.

`python -m leyden.engine.boundary.process SOCKET PARENT_PID LOG_LEVEL LOG_FORMAT`

Messages are msgspec structs over one ZeroMQ ipc socket, in a folder that only this user can enter. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import zmq

from ...configs.schema import EngineConfig
from .. import logs
from ..errors import LeydenError
from ..messages import EngineFailed, FromEngine, ToEngine, engine_decoder

logger = logging.getLogger("leyden.engine")

PARENT_POLL_SECONDS = 1.0


class Link:
    """The engine's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._decoder = engine_decoder()
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def receive(self, wait_seconds: float) -> list[ToEngine]:
        """Return the messages that have arrived. Waits at most `wait_seconds` for the first one."""
        messages = []
        if wait_seconds:
            self._socket.poll(round(wait_seconds * 1000))
        while self._socket.poll(0):
            messages.append(self._decoder.decode(self._socket.recv()))
        return messages

    def close(self) -> None:
        self._socket.close()
        zmq.Context.instance().term()


def connect(address: str, parent: int) -> Link:
    """Connect to the parent's socket. From now on the process ends when the parent is gone, even within a step."""
    path = Path(address.removeprefix("ipc://"))
    threading.Thread(target=_end_with, args=(parent, path), name="parent", daemon=True).start()
    return Link(address)


def _end_with(parent: int, path: Path) -> None:
    """Wait until the parent is gone. Then remove the socket at `path` and its folder, which the parent made, and end
    this process."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()
    logger.error("the server is gone")
    os._exit(1)


def main() -> int:
    """Run the engine. Returns the exit code: 0 after a shutdown, 2 for a wrong setting or checkpoint, 1 for a
    failure."""
    address, parent, log_level, log_format = sys.argv[1:]
    logs.configure(log_level, "json" if log_format == "json" else "text")
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group or container; only the server obeys
        signal.signal(number, signal.SIG_IGN)
    link = connect(address, int(parent))
    try:
        config = EngineConfig.model_validate_json(sys.stdin.buffer.read())
        return _serve(config, link)
    except LeydenError as error:
        link.send(EngineFailed(str(error), is_user_error=True))
        return 2
    except Exception as error:
        logger.exception("the engine failed")
        link.send(EngineFailed(f"{type(error).__name__}: {error}"))
        return 1
    finally:
        link.close()


def _serve(config: EngineConfig, link: Link) -> int:
    from ..core import EngineCore, grammar_compiler
    from .loop import run_loop

    grammars = grammar_compiler(config)
    grammars.prepare()  # loads its tokenizer while the model loads
    core = EngineCore(config, progress=sys.stderr.isatty(), grammars=grammars)
    core.hold_share()
    grammars.wait()
    gc.collect()
    gc.freeze()  # the objects of start-up live as long as the process; later collections skip them
    link.send(core.info)
    run_loop(core, link.receive, link.send)
    return 0


if __name__ == "__main__":
    sys.exit(main())
