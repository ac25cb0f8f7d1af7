"""A picture of the latencies: for each case the share of requests or tokens at most as slow as each time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BenchUsageError
from .report import TITLES, Latencies

PANELS = ("ttft", "itl", "e2e")
SHARES = (0.0, 0.25, 0.5, 0.75, 0.95, 0.99)  # with a line across; the report's percentiles are among them
FASTEST = 0.005  # share of latencies that may lie left of the axis, since chunks read at once would stretch it
MAX_POINTS = 2000  # of a curve; more cannot be seen
LEAST_SECONDS = 1e-4  # a logarithmic axis has no zero


def require_matplotlib() -> None:
    """Raise `BenchUsageError` if matplotlib is missing, before minutes of measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchUsageError("--picture needs matplotlib: pip install matplotlib, or leave --picture out")


def ecdf(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(value, share of the values that are at most as large), increasing, in at most MAX_POINTS points."""
    shares = np.linspace(0.0, 1.0, min(len(values), MAX_POINTS))
    return np.quantile(values, shares, method="inverted_cdf"), shares


def draw(cases: dict[str, Latencies], title: str, path: Path) -> None:
    """One panel per latency, one curve per case, milliseconds on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    for axes, latency in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        _draw_panel(axes, {name: latencies[latency] for name, latencies in cases.items()}, TITLES[latency])
    figure.axes[0].set_ylabel("share at most as slow")
    figure.suptitle(title)
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=120)


def _draw_panel(axes: Any, cases: dict[str, np.ndarray], title: str) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

    curves = {
        name: ecdf(1e3 * np.maximum(latencies, LEAST_SECONDS)) for name, latencies in cases.items() if len(latencies)
    }
    for name, (values, shares) in curves.items():
        axes.step(values, shares, where="post", label=name, linewidth=1.8)
    axes.set(title=title, xscale="log", xlabel="milliseconds", ylim=(0, 1.01))
    if curves:
        axes.set_xlim(left=0.9 * min(np.interp(FASTEST, shares, values) for values, shares in curves.values()))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(FixedLocator(SHARES))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(axis="y", labelsize="small")
    axes.grid(alpha=0.3)
