"""A real `leyden serve` in a process of its own, over a tiny random checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served import Served, launch
from tiny_models import save_minimax


@pytest.fixture(scope="session", autouse=True)
def _hear_ctrl_c() -> None:
    """What a shell runs in the background ignores Ctrl-C, and so would the servers of tests that run there."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_minimax(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def shared(checkpoint) -> Iterator[Served]:
    """One server for tests that leave it as they found it."""
    served = launch(str(checkpoint), "--max-num-seqs", "64", "--served-model-name", "tiny")
    yield served
    served.wait_idle()
    assert served.terminate() == 0


@pytest.fixture
def serve(checkpoint) -> Iterator[Callable[..., Served]]:
    """Start servers that a test may kill."""
    started: list[Served] = []

    def start(*arguments: str, folder: Path = checkpoint, env: dict[str, str] | None = None) -> Served:
        started.append(launch(str(folder), "--served-model-name", "tiny", *arguments, env=env))
        return started[-1]

    yield start
    for served in started:
        served.kill()
