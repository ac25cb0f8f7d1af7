"""An engine that takes its time is told from one that hangs."""

from __future__ import annotations

import pytest
from leyden.engine.boundary import loop
from leyden.engine.boundary.heartbeat import Heartbeat
from leyden.engine.messages import AbortRequest, EngineStats, Shutdown, StepOutputs


def lives_through(heartbeat, messages):
    """One second after each message; whether the engine counts as alive throughout."""
    for message in messages:
        if message is not None:
            heartbeat.note(message)
        heartbeat.tick(1.0)
        if heartbeat.has_stopped:
            return False
    return True


@pytest.mark.parametrize(
    ("messages", "lives"),
    [
        ([EngineStats()] * 100, True),
        ([EngineStats(num_running=1, steps_total=i) for i in range(100)], True),
        ([EngineStats(), *[None] * 9, EngineStats(num_running=1, steps_total=1)], True),
        ([EngineStats(), *[None] * 10], False),
        ([EngineStats(num_running=1, steps_total=7)] * 12, False),
    ],
    ids=["idle", "steps", "a step as long as the bound", "silence", "talk without steps"],
)
def test_engine_is_alive_while_it_speaks_and_finishes_steps(messages, lives):
    assert lives_through(Heartbeat(10.0), messages) is lives


def test_engine_is_silent_after_two_beats_that_did_not_come():
    heartbeat = Heartbeat(10.0)
    for _ in range(3):
        assert not heartbeat.is_silent
        heartbeat.tick(1.0)
    assert heartbeat.is_silent and not heartbeat.has_stopped
    heartbeat.note(EngineStats(num_running=1))
    assert not heartbeat.is_silent


class ScriptedCore:
    """Has work or has none, and never an output. A turn of the loop takes a second."""

    class sessions:
        advance = staticmethod(lambda: [])

    def __init__(self, has_work, clock):
        self.has_work = has_work
        self.clock = clock
        self.num_steps = 0

    def step(self, tell_started):
        self.num_steps += 1
        self.clock.now += 0.5
        return []

    def abort_request(self, request_id):
        pass

    def stats(self):
        return EngineStats(steps_total=self.num_steps)


@pytest.mark.parametrize("has_work", [False, True], ids=["idle", "a long prompt"])
def test_loop_says_something_every_second_with_and_without_work(monkeypatch, has_work):
    class Clock:
        now = 0.0
        monotonic = classmethod(lambda cls: cls.now)

    waits, sent = [], []

    def receive(wait_seconds):
        waits.append(wait_seconds)
        return [Shutdown()] if len(waits) > 10 else [AbortRequest("x")] if len(waits) == 10 else []

    monkeypatch.setattr(loop, "time", Clock)
    loop.run_loop(ScriptedCore(has_work, Clock), receive, sent.append)
    assert set(waits) == {0.0 if has_work else 1.0}
    assert all(isinstance(message, StepOutputs) for message in sent)
    steps = [message.stats.steps_total for message in sent]
    assert steps == ([2, 4, 6, 8, 10] if has_work else list(range(1, 11)))
