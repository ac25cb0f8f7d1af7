"""The outputs of one sequence on their way to the coroutine that reads them."""

from __future__ import annotations

import asyncio
import math

from ..errors import EngineDeadError, QueueTimeoutError, StoppingError
from ..outputs import StepOutput

StreamFailure = EngineDeadError | StoppingError | QueueTimeoutError


class Stream:
    """One sequence's outputs, which its reader takes at its own pace.

    Waiting outputs are merged into one. So a slow reader gets fewer and longer outputs, and at most the ids (and
    log-probabilities) of one answer wait here. A fast reader gets each output at once.

    deadline: the sequence's latest start, on the event loop's clock. leader: the stream of the sequence's leader
    (`scheduling.siblings`), if it has one.
    """

    def __init__(self, deadline: float = math.inf, leader: Stream | None = None) -> None:
        self.deadline = deadline
        self.leader = leader
        self.is_started = False
        self._outputs: list[StepOutput] = []  # more than one only when the last is a failure
        self._failure: StreamFailure | None = None
        self._arrival: asyncio.Future[None] | None = None

    def put(self, output: StepOutput) -> None:
        """Add an output for the reader. Merges it in place into the waiting one, if there is one."""
        if self._outputs and not output.is_failure:
            self._outputs[-1].extend(output)
        else:
            self._outputs.append(output)
        self._wake()

    @property
    def has_left_queue(self) -> bool:
        """Whether the sequence's prompt is being computed, for itself or for its leader."""
        return self.is_started or (self.leader is not None and self.leader.is_started)

    def fail(self, error: StreamFailure) -> None:
        """End the stream: the reader gets the waiting outputs, then the error."""
        self._failure = error
        self._wake()

    async def get(self) -> StepOutput:
        """Wait for an output and take it. Raises the stream's failure once no output is left."""
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
