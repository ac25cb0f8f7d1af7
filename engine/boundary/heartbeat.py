"""Tell from an engine's messages alone whether it goes on."""

from __future__ import annotations

from ..messages import EngineStats

BEAT_SECONDS = 1.0  # between two messages of an engine at most, unless a step takes longer
SILENT_SECONDS = 2 * BEAT_SECONDS


class Heartbeat:
    """Tells an engine that takes its time from one that hangs.

    An engine is alive while it says something and, as long as it runs sequences, finishes steps. Seconds are counted by
    `tick`, not read from a clock: while this process itself stands still (Ctrl-Z), no time passes for the engine.
    """

    def __init__(self, step_timeout: float) -> None:
        self.step_timeout = step_timeout
        self._num_steps = 0
        self._silent_seconds = 0.0
        self._stuck_seconds = 0.0  # since the last step, or since no sequence ran

    @property
    def is_silent(self) -> bool:
        """The engine is in a long step, or hangs: it reads no messages."""
        return self._silent_seconds > SILENT_SECONDS

    @property
    def has_stopped(self) -> bool:
        return self._stuck_seconds > self.step_timeout

    def note(self, stats: EngineStats) -> None:
        """A message has come."""
        self._silent_seconds = 0.0
        if stats.num_running == 0 or stats.steps_total != self._num_steps:
            self._stuck_seconds = 0.0
        self._num_steps = stats.steps_total

    def tick(self, seconds: float) -> None:
        self._silent_seconds += seconds
        self._stuck_seconds += seconds
