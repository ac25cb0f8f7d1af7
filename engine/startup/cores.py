"""The processor cores of this process. The module imports no torch: processes without a model read it, too."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
