"""The engine's loop: receive messages, run a step, send its outputs. The same in one process or two."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..core import EngineCore
from ..errors import QueueFullError, RequestError
from ..messages import AbortRequest, AddRequest, FromEngine, SessionCall, Shutdown, StepOutputs, ToEngine
from ..outputs import StepOutput, refusal
from .heartbeat import BEAT_SECONDS

# Returns the messages that have arrived. Waits for the first one at most so many seconds.
Receive = Callable[[float], list[ToEngine]]


def run_loop(core: EngineCore, receive: Receive, send: Callable[[FromEngine], None]) -> None:
    """Serve until a `Shutdown` message. An error of one request is its answer; any other error leaves the loop.

    Sends a message at least every `BEAT_SECONDS`, unless a step takes longer, also while idle (`Heartbeat`).
    """
    last_sent = time.monotonic()

    def tell_started(request_ids: list[str]) -> None:
        send(StepOutputs(outputs=[], stats=core.stats(), started=request_ids))

    while True:
        is_idle = not core.has_work
        messages = receive(BEAT_SECONDS if is_idle else 0.0)
        if any(isinstance(message, Shutdown) for message in messages):
            return
        outputs = [output for message in messages if (output := _handle(core, message)) is not None]
        outputs += core.step(tell_started)
        for done in core.sessions.advance():
            send(done)
        if outputs or messages or is_idle or time.monotonic() - last_sent >= BEAT_SECONDS:
            for part in _parted(outputs):
                send(StepOutputs(outputs=part, stats=core.stats()))
            last_sent = time.monotonic()


def _parted(outputs: list[StepOutput]) -> list[list[StepOutput]]:
    """Split the outputs by message. Each output with scores of a prompt gets a message of its own, which bounds the
    length of messages. The other outputs follow in one message."""
    scored = [[output] for output in outputs if output.prompt_logprobs is not None]
    return [*scored, [output for output in outputs if output.prompt_logprobs is None]]


def _handle(core: EngineCore, message: ToEngine) -> StepOutput | None:
    match message:
        case AddRequest():
            try:
                core.add_request(message)
            except (RequestError, QueueFullError) as error:
                return refusal(message.request_id, error)
        case AbortRequest():
            core.abort_request(message.request_id)
        case SessionCall():
            core.sessions.add(message)
    return None
