"""Runs the choices of one request side by side. All of them stop when the client leaves or one of them fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from ...engine.errors import QueueFullError, QueueTimeoutError, RequestError
from ...engine.outputs import RequestOutput
from ..door.choices import Choice
from ..door.validation import Prepared
from ..errors import ApiError
from ..metrics import SequenceTimer
from ..off_loop import CHARS_PER_SCORE, CHARS_PER_TEXT
from ..state import ServerState
from .events import Event, Events, Watch

T = TypeVar("T")

# Outputs per choice that wait here for a slow reader. When the queue is full the choices stop pulling from the engine.
QUEUE_PER_CHOICE = 2


def generate(state: ServerState, choices: list[Choice]) -> Events:
    """Outputs of all choices as they come. Outputs of one choice that pile up before they are read come as one. Closing
    the iterator aborts the choices that still run.

    All or nothing: as soon as one choice fails, for instance because the queue is full, the rest is aborted and the
    error is raised, even ahead of outputs that came before it.
    """
    return _run(state, choices[0]) if len(choices) == 1 else _run_side_by_side(state, choices)


def traced(http: Request, state: ServerState, prepared: Prepared[Any], answer_id: str, events: Events) -> Events:
    """The same events, observed by the request's trace if it has one."""
    watch: Watch | None = http.scope["state"].get("watch")
    return events if watch is None else watch(prepared, state.model_name, answer_id, events)


async def _run_side_by_side(state: ServerState, choices: list[Choice]) -> Events:
    queue: asyncio.Queue[Event | None] = asyncio.Queue(maxsize=QUEUE_PER_CHOICE * len(choices))
    failures: list[Exception] = []

    async def feed(choice: Choice) -> None:
        try:
            async with aclosing(_run(state, choice)) as outputs:
                async for event in outputs:
                    await queue.put(event)
        except Exception as error:
            failures.append(error)
        await queue.put(None)

    tasks = [asyncio.create_task(feed(choice)) for choice in choices]
    num_running = len(tasks)
    try:
        while num_running:
            item = await queue.get()
            if failures:
                raise failures[0]
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        await cancel_all(*tasks)


async def _run(state: ServerState, choice: Choice) -> Events:
    timer = SequenceTimer(state.metrics)
    outputs = state.llm.generate(choice.request, choice.answer.shown_ids, choice.answer.stop_scope())
    reason: str | None = "abort"  # replaced by the finish reason of the last output
    try:
        async with aclosing(outputs) as closing:  # type: ignore[type-var]
            async for output in closing:
                timer.observe(output)
                _raise_if_failed(output)
                yield choice, output
    except (RequestError, QueueFullError, QueueTimeoutError) as error:  # the engine never began the sequence
        reason = None
        if getattr(error, "param", None) == "grammar":  # of the engine; the client knows it by `form_field`
            raise RequestError(f"{choice.form_field} cannot be used: {error}", choice.form_field) from None
        raise
    except Exception:
        reason = "error"
        raise
    finally:
        timer.close(reason)


def _raise_if_failed(output: RequestOutput) -> None:
    """Only "stop" and "length" are shown as finish reasons; the others are errors to a client."""
    if output.finish_reason == "error":
        raise ApiError(500, output.error or "the engine failed on this request", code="generation_failed")
    if output.finish_reason == "abort":
        raise ApiError(500, "the engine aborted this request", code="generation_aborted")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves first, cancels `work` and raises `ClientDisconnect`."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        await cancel_all(working, leaving)


async def collect(events: Events) -> list[Event]:
    """One event per choice, in order of index: all outputs of the choice merged into its first one, in place."""
    merged: dict[int, Event] = {}
    pieces: dict[int, list[str]] = {}
    async for event in events:
        index, output = event[0].index, event[1]
        pieces.setdefault(index, []).extend(output.pieces)
        if index in merged:
            merged[index][1].extend(output)
        else:
            merged[index] = event
    for index, (_, output) in merged.items():
        output.text, output.pieces = "".join(pieces[index]), pieces[index]
    return [merged[index] for index in sorted(merged)]


def num_chars(output: RequestOutput) -> int:
    """The cost of writing an output, in the unit of `off_loop`. Text costs little, log-probabilities much."""
    return len(output.text) // CHARS_PER_TEXT + output.num_scores * CHARS_PER_SCORE


async def cancel_all(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait for their end: when this returns their resources are free."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
