"""From samples to latencies, and from latencies to a report and its table.

time to first token   from sending a request until its first token arrives
between tokens        the time between tokens: a chunk of k tokens that comes t after the one before counts as k gaps of
                      t / k. The tokens of a first chunk beyond the first have no gap
between chunks        the same without spreading, one gap per chunk: a stall shows here in full, however many tokens
                      came after it at once
time per token        of one request: from first to last token, divided by the tokens after the first chunk
end to end            from sending a request until its stream has ended

Requests that failed are in the counts of errors and in none of the latencies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.text.screen import for_screen
from .client import Sample
from .goodput import Bound, RequestLatency, count_within
from .workers import Result

TITLES = {
    "ttft": "time to first token",
    "itl": "between tokens",
    "gap": "between chunks",
    "tpot": "time per token",
    "e2e": "end to end",
}
PERCENTILES = {"p50": 50, "p95": 95, "p99": 99}
LATE_SECONDS = 0.01
BUSY_SHARE = 0.9
MANY_TOKENS = 1.2

Latencies = dict[str, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """The numbers of one case, and the latencies [s] behind them."""

    numbers: dict[str, Any]
    latencies: Latencies


def measured(results: Sequence[Result], bounds: Sequence[Bound]) -> Measured:
    """Join the results of all workers for one case. `bounds`: of goodput, possibly none."""
    samples = [sample for result in results for sample in result.samples]
    answered = [sample for sample in samples if sample.error is None]
    seconds = max((sample.ended for sample in samples), default=0.0) - results[0].start
    latencies = latencies_of(answered)
    output = sum(sample.num_output_tokens for sample in answered)
    numbers: dict[str, Any] = {
        "requests": len(samples),
        "errors": error_counts(samples),
        "seconds": round(seconds, 4),
        "requests_per_s": round(len(answered) / seconds, 3),
        "output_tokens_per_s": round(output / seconds, 2),
        "prompt_tokens_per_s": round(sum(sample.num_prompt_tokens for sample in answered) / seconds, 2),
        "tokens_per_chunk": round(output / max(1, sum(len(sample.times) for sample in answered)), 3),
        **{f"{name}_s": distribution(values) for name, values in latencies.items()},
        "client": {
            "workers": len(results),
            "cpu_share": round(max(result.cpu_share for result in results), 3),
            "lag_s": round(max((sample.lag for sample in samples), default=0.0), 5),
        },
    }
    if bounds:
        good = count_within(bounds, [request_latency(sample) for sample in answered])
        numbers["goodput"] = {
            "bounds": " ".join(map(str, bounds)),
            "share": round(good / max(1, len(samples)), 4),
            "requests_per_s": round(good / seconds, 3),
        }
    return Measured(numbers, latencies)


def latencies_of(samples: Sequence[Sample]) -> Latencies:
    """Seconds, of every request or of every token after the first chunk."""
    spread = [spread_gaps(sample) for sample in samples]
    gaps = [np.diff(sample.times) for sample in samples]
    return {
        "ttft": np.array([sample.times[0] - sample.started for sample in samples]),
        "itl": np.concatenate(spread) if spread else np.empty(0),
        "gap": np.concatenate(gaps) if gaps else np.empty(0),
        "tpot": np.array([values.mean() for values in spread if len(values)]),
        "e2e": np.array([sample.ended - sample.started for sample in samples]),
    }


def spread_gaps(sample: Sample) -> np.ndarray:
    """The time before each token after the first chunk: a chunk's gap, divided among its tokens."""
    tokens = np.asarray(sample.tokens)[1:]
    return np.repeat(np.diff(sample.times) / tokens, tokens)


def request_latency(sample: Sample) -> RequestLatency:
    gaps = spread_gaps(sample)
    return {
        "ttft": sample.times[0] - sample.started,
        "itl": float(np.percentile(gaps, 99)) if len(gaps) else 0.0,
        "tpot": float(gaps.mean()) if len(gaps) else 0.0,
        "e2e": sample.ended - sample.started,
    }


def distribution(values: np.ndarray) -> dict[str, float] | None:
    """Mean, interpolated percentiles and maximum, in the unit of `values`; None if there are no values."""
    if not len(values):
        return None
    points = np.percentile(values, list(PERCENTILES.values()))
    named = {
        "mean": values.mean(),
        **dict(zip(PERCENTILES, points, strict=True)),
        "max": values.max(),
    }
    return {name: round(float(value), 6) for name, value in named.items()}


def background_numbers(result: Result) -> dict[str, Any]:
    """The numbers of the background requests. Requests under way at the end of the case are not counted."""
    answered = [sample for sample in result.samples if sample.error is None]
    prompt_tokens = sum(sample.num_prompt_tokens for sample in answered)
    seconds = max((sample.ended for sample in result.samples), default=result.start) - result.start
    return {
        "requests": len(result.samples),
        "errors": error_counts(result.samples),
        "prompt_tokens_per_s": round(prompt_tokens / seconds, 2) if seconds else 0.0,
        "ttft_s": distribution(latencies_of(answered)["ttft"]),
    }


def error_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """The number of failed requests by kind of failure, the most frequent kind first."""
    return dict(Counter(sample.error for sample in samples if sample.error is not None).most_common())


def print_report(report: dict[str, Any]) -> None:
    where = f" on {report['hardware']}" if report["hardware"] else ""
    started = f"; start to ready {report['start_to_ready_s']} s" if report["start_to_ready_s"] is not None else ""
    print(for_screen(f"\n{report['model']} at {report['url']}{where}{started}"))
    print(f"{report['endpoint']}, prompts of {report['prompt_tokens']} tokens, answers of {report['max_tokens']}")
    for case in report["cases"]:
        print()
        print("\n".join(case_lines(case)))


def case_lines(case: dict[str, Any]) -> list[str]:
    """One case of a report, as a small table in milliseconds."""
    lines = [
        f"{case['name']}: {case['requests']} requests in {case['seconds']:.2f} s, {counted(case['errors'])}; "
        f"{case['requests_per_s']:g} requests/s, {case['output_tokens_per_s']:g} output tokens/s, "
        f"{case['prompt_tokens_per_s']:g} prompt tokens/s, {case['tokens_per_chunk']:g} tokens per chunk",
        f"  {'ms':<20}" + "".join(f"{name:>10}" for name in ("mean", *PERCENTILES, "max")),
    ]
    for name, title in TITLES.items():
        values = case[f"{name}_s"]
        if values is not None:
            lines.append(f"  {title:<20}" + "".join(f"{1e3 * value:>10.2f}" for value in values.values()))
    if "goodput" in case:
        good = case["goodput"]
        lines.append(
            f"  within {good['bounds']}: {good['share']:.1%} of requests, {good['requests_per_s']:g} per second"
        )
    if "background" in case:
        behind = case["background"]
        lines.append(
            f"  in the background {behind['requests']} requests, {counted(behind['errors'])}, "
            f"{behind['prompt_tokens_per_s']:g} prompt tokens/s"
        )
    return lines + warnings_of(case)


def warnings_of(case: dict[str, Any]) -> list[str]:
    """Reasons to mistrust the numbers: a busy or late client, or chunks of several tokens."""
    client, warnings = case["client"], []
    if client["cpu_share"] > BUSY_SHARE:
        warnings.append(f"  a client process was busy {client['cpu_share']:.0%} of the time: raise --workers")
    if client["lag_s"] > LATE_SECONDS:
        warnings.append(f"  requests were sent up to {1e3 * client['lag_s']:.1f} ms late: raise --workers")
    if case["tokens_per_chunk"] > MANY_TOKENS:
        warnings.append(
            "  many chunks hold several tokens, whose gap is divided: --token-ids asks for a chunk for each"
        )
    return warnings


def counted(errors: dict[str, int]) -> str:
    total = sum(errors.values())
    told = ", ".join(f"{count} {kind}" for kind, count in errors.items())
    return f"{total} errors ({told})" if total else "no errors"
