"""The hardware and software of a measurement."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

from ...engine.startup.cores import num_cores


def processor() -> str:
    """The number of cores and the processor's name."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found.group(1).strip() if found else name
    return f"{num_cores()} cores of {name}"


def hardware() -> str:
    """The GPU when there is one, else the processor, and the number of cores."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        gpu = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        return f"{gpu.stdout.strip().splitlines()[0]}, {num_cores()} CPU cores"
    return processor()


def software() -> dict[str, str]:
    """Versions of the installed packages that decide the speed."""
    found = {}
    for package in ("torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
