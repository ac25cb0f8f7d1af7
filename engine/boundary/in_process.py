"""The client of an engine that runs in a thread of this process: for tests and notebooks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading

from ..core import EngineCore
from ..errors import LeydenError
from ..messages import EngineFailed, FromEngine, Shutdown, ToEngine
from .client import EngineClient
from .loop import run_loop

logger = logging.getLogger("leyden.engine")


class InProcessClient(EngineClient):
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
        try:
            core = EngineCore(self.config, progress=False)
            self._post(core.info)
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
        with contextlib.suppress(RuntimeError):  # the event loop may be closed already
            self._loop.call_soon_threadsafe(self._receive, message)
