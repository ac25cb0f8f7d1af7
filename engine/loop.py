"""The engine's own thread of control: take messages, step, send what came out. The same in one process or two."""

from __future__ import annotations

from collections.abc import Callable

from .core import EngineCore, refusal
from .errors import QueueFullError, RequestError
from .messages import AbortRequest, AddRequest, FromEngine, SessionCall, Shutdown, StepOutputs, ToEngine
from .outputs import StepOutput

# Returns the messages that are there; waits for one when `wait` is true.
Receive = Callable[[bool], list[ToEngine]]


def run_loop(core: EngineCore, receive: Receive, send: Callable[[FromEngine], None]) -> None:
    """Serve until a `Shutdown` message. Errors of one request are answered to it; any other error leaves the loop."""
    while True:
        messages = receive(not core.has_work)
        if any(isinstance(message, Shutdown) for message in messages):
            return
        outputs = [output for message in messages if (output := _handle(core, message)) is not None]
        outputs += core.step()
        for done in core.sessions.advance():
            send(done)
        if outputs or messages:
            send(StepOutputs(outputs=outputs, stats=core.stats()))


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
