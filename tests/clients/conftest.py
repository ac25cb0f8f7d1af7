"""Clients that others wrote, in an environment of their own: `make clients` makes it; without it these are skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, launch

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("CLIENTS_PYTHON", ROOT / ".venv-clients/bin/python"))
NODE_MODULES = Path(os.environ.get("CLIENTS_NODE", ROOT / ".venv-clients/node_modules"))


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    """The embedded model, with tools in Hermes' format."""
    served = launch("--max-num-seqs", "8", "--cpu-memory-gb", "0.5")
    yield served
    served.wait_idle()
    assert served.terminate() == 0


def _run(command: list[str], env: dict[str, str]) -> Any:
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def clients_bin() -> Path:
    """Where the clients' commands are."""
    if not PYTHON.exists():
        pytest.skip("needs `make clients`")
    return PYTHON.parent


@pytest.fixture
def client(clients_bin, demo) -> Callable[..., Any]:
    """client(script, *arguments): what a script prints that is run by the clients' Python, with the server's URL."""
    return lambda script, *arguments: _run([str(PYTHON), str(HERE / script), demo.url, *map(str, arguments)], {})


@pytest.fixture
def node_client(demo) -> Callable[..., Any]:
    """The same by Node."""
    if not NODE_MODULES.exists() or shutil.which("node") is None:
        pytest.skip("needs `make clients` and Node")
    return lambda script: _run(["node", str(HERE / script), demo.url, str(NODE_MODULES)], {})
