"""Detects an engine that hangs, from its messages alone."""

from __future__ import annotations

from ..messages import EngineStats

BEAT_SECONDS = 1.0  # the longest time between two messages of an engine, unless a step takes longer
SILENT_SECONDS = 2 * BEAT_SECONDS


class Heartbeat:
    """Tells a slow engine from one that hangs.

    An engine is alive while it sends messages and, as long as it runs sequences, finishes steps. `tick` counts the
    seconds; no clock is read. So no time passes for the engine while this process is stopped (Ctrl-Z).
    """

    def __init__(self, step_timeout: float) -> None:
        self.step_timeout = step_timeout
        self._num_steps = 0
        self._silent_seconds = 0.0
        self._stuck_seconds = 0.0  # since the last step ended, or since a message said that no sequence runs

    @property
    def is_silent(self) -> bool:
        """Whether the engine is in a long step or hangs. It then reads no messages."""
        return self._silent_seconds > SILENT_SECONDS

    @property
    def has_stopped(self) -> bool:
        return self._stuck_seconds > self.step_timeout

    def note(self, stats: EngineStats) -> None:
        """Note the numbers of a message that has arrived."""
        self._silent_seconds = 0.0
        if stats.num_running == 0 or stats.steps_total != self._num_steps:
            self._stuck_seconds = 0.0
        self._num_steps = stats.steps_total

    def tick(self, seconds: float) -> None:
        self._silent_seconds += seconds
        self._stuck_seconds += seconds
