"""A real `leyden serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    url: str

    @property
    def engine_pid(self) -> int:
        """The engine is the server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1
        return int(children[0])

    def gauge(self, name: str) -> float:
        """The current value of an unlabelled-by-anything-but-model metric."""
        text = httpx.get(f"{self.url}/metrics").text
        return float(re.search(rf"^leyden:{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE).group(1))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.02)

    def wait_idle(self) -> None:
        """Every slot and block has come back."""
        self.wait_for(lambda: self.gauge("state_slots_used") == 0 and self.gauge("kv_cache_usage_perc") == 0)

    def terminate(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=30)
        finally:
            self.process.stdout.close()

    def kill(self) -> None:
        """End the process, whether or not it still runs."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def launch(*arguments: str, env: dict[str, str] | None = None) -> Served:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "leyden.server.commands.cli", "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""} | (env or {}),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"\s+address\s+(\S+)", line):
            served = Served(process, found.group(1))
            break
    else:
        raise AssertionError(f"the server ended with code {process.wait()}")
    assert httpx.get(f"{served.url}/health").status_code == 200, "who is told the address can reach it"
    return served
