"""A picture of the latencies: for each case, which share of the requests or tokens was at least as fast as that."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from .errors import BenchError
from .report import TITLES, Latencies

PANELS = ("ttft", "itl", "e2e")
MAX_POINTS = 2000  # of a curve; more cannot be seen


def require_matplotlib() -> None:
    """Before minutes of measuring. Raises `BenchError` with the remedy."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--picture needs matplotlib: pip install 'leyden[bench]', or leave --picture out")


def ecdf(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(value, share of the values that are at most as large), increasing, in at most MAX_POINTS points."""
    shares = np.linspace(0.0, 1.0, min(len(values), MAX_POINTS))
    return np.quantile(values, shares, method="inverted_cdf"), shares


def draw(cases: dict[str, Latencies], title: str, path: Path) -> None:
    """One panel per latency, one curve per case, milliseconds on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, latency in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        for name, latencies in cases.items():
            if len(latencies[latency]):
                values, shares = ecdf(latencies[latency])
                axes.step(1e3 * np.maximum(values, 1e-6), shares, where="post", label=name, linewidth=1.6)
        axes.set(title=TITLES[latency], xscale="log", xlabel="milliseconds", ylim=(0, 1.02))
        axes.grid(which="both", alpha=0.25)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.axes[0].set_ylabel("share at most as slow")
    figure.axes[0].legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
