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

from ...configs.sources import SettingsError
from .errors import BenchError

STOP_SECONDS = 60
HEALTH_SECONDS = 30.0


@contextlib.contextmanager
def own_server(model: str, serve_args: str) -> Iterator[tuple[str, float]]:
    """Start `leyden serve`, yield its url and the seconds from process start to the first 200 of /health, then stop it.

    Raises `BenchError` if the server does not start, `SettingsError` if `serve_args` cannot be split.
    """
    started = time.perf_counter()
    command = [
        sys.executable,
        "-P",
        "-m",
        "leyden.server.commands.cli",
        "serve",
        model,
        "--port",
        "0",
        *_split(serve_args),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        url = _wait_for_address(process)
        _require_health(url)
        yield url, round(time.perf_counter() - started, 2)
    finally:
        _stop(process)


def _split(serve_args: str) -> list[str]:
    try:
        return shlex.split(serve_args)
    except ValueError as error:
        raise SettingsError(f"--serve-args {serve_args!r} is not a command line ({error}); close it") from None


def _wait_for_address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        if found := re.match(r"\s+address\s+(\S+)", line):
            return found.group(1)
    raise BenchError(f"the server ended with code {process.wait()}; its message is above")


def _require_health(url: str) -> None:
    try:
        httpx.get(f"{url}/health", timeout=HEALTH_SECONDS).raise_for_status()
    except httpx.HTTPError as error:
        raise BenchError(f"the server at {url} started but is not healthy ({error}); its messages are above") from None


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"the server did not stop within {STOP_SECONDS} s and is killed", file=sys.stderr)
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()
