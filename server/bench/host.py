"""Leyden's own server, started for a measurement and stopped after it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx

from .errors import BenchError

STOP_SECONDS = 60


@contextlib.contextmanager
def own_server(model: str, serve_args: str) -> Iterator[tuple[str, float]]:
    """(url, seconds from process start to the first 200 of /health). Raises `BenchError` if it does not start."""
    started = time.perf_counter()
    command = [sys.executable, "-P", "-m", "leyden.server.cli", "serve", model, "--port", "0", *shlex.split(serve_args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        url = _wait_for_address(process)
        httpx.get(f"{url}/health").raise_for_status()
        yield url, round(time.perf_counter() - started, 2)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=STOP_SECONDS)


def _wait_for_address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        if found := re.match(r"\s+address\s+(\S+)", line):
            return found.group(1)
    raise BenchError(f"the server ended with code {process.wait()}; its message is above")
