"""Samples -> numbers."""

from __future__ import annotations

import argparse
import importlib.util
from array import array

import numpy as np
import pytest
from leyden.benchmarks.load.client import Sample
from leyden.benchmarks.load.errors import BenchError
from leyden.benchmarks.load.goodput import Bound, count_within
from leyden.benchmarks.load.picture import draw, ecdf, require_matplotlib
from leyden.benchmarks.load.report import case_lines, distribution, latencies_of, measured, print_report, spread_gaps
from leyden.benchmarks.load.workers import Result


def sample(started=10.0, times=(10.5, 10.6, 10.9), tokens=(1, 1, 3), ended=11.0, error=None, lag=0.0) -> Sample:
    return Sample(
        0,
        started,
        ended,
        lag,
        array("d", times),
        array("l", tokens),
        num_prompt_tokens=7,
        num_output_tokens=sum(tokens),
        error=error,
    )


def case(*samples: Sample, bounds=()) -> dict:
    return measured([Result(10.0, list(samples), 0.5)], bounds).numbers


def test_percentiles_interpolate_between_neighbours():
    values = distribution(np.arange(101.0))
    assert values == {"mean": 50.0, "p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert distribution(np.array([1.0, 2.0]))["p95"] == pytest.approx(1.95)
    assert distribution(np.empty(0)) is None


def test_a_chunk_of_several_tokens_shares_its_gap_among_them():
    assert spread_gaps(sample()) == pytest.approx([0.1, 0.1, 0.1, 0.1])
    latencies = latencies_of([sample(), sample(times=(12.0,), tokens=(4,), ended=12.0)])
    assert latencies["ttft"] == pytest.approx([0.5, 2.0])
    assert latencies["gap"] == pytest.approx([0.1, 0.3])
    assert latencies["tpot"] == pytest.approx([0.1])
    assert latencies["e2e"] == pytest.approx([1.0, 2.0])
    assert len(latencies["itl"]) == 4, "the tokens of a first chunk have no gap"


def test_throughput_counts_answers_over_the_time_of_all():
    numbers = case(sample(), sample(ended=12.0))
    assert numbers["seconds"] == 2.0
    assert (numbers["requests_per_s"], numbers["output_tokens_per_s"], numbers["prompt_tokens_per_s"]) == (
        1.0,
        5.0,
        7.0,
    )
    assert numbers["tokens_per_chunk"] == pytest.approx(10 / 6, abs=1e-3)


def test_errors_are_counted_by_kind_and_are_in_no_latency():
    numbers = case(sample(), sample(times=(), error="timeout", ended=12.0), sample(started=0, error="status 429"))
    assert (numbers["requests"], numbers["errors"]) == (3, {"timeout": 1, "status 429": 1})
    assert numbers["requests_per_s"] == 0.5
    assert numbers["ttft_s"]["max"] == 0.5
    lines = "\n".join(case_lines({"name": "2 streams", **numbers}))
    assert "2 errors (1 timeout, 1 status 429)" in lines


@pytest.mark.parametrize(
    ("bounds", "good"),
    [
        ("ttft:500ms", 2),
        ("ttft:499ms", 1),
        ("itl:110ms e2e:1s", 1),
        ("itl:0.2s e2e:1s", 2),
        ("tpot:99000us", 0),
        ("e2e:0.4s", 0),
    ],
)
def test_a_request_is_good_when_it_keeps_every_bound(bounds, good):
    parsed = [Bound.parse(text) for text in bounds.split()]
    samples = [sample(), sample(times=(10.2, 10.5, 10.7), tokens=(1, 2, 1)), sample(error="timeout")]
    found = case(*samples, bounds=parsed)["goodput"]
    assert found == {"bounds": bounds, "share": round(good / 3, 4), "requests_per_s": float(good)}


def test_bounds_hold_for_a_request_of_one_token():
    latency = {"ttft": 0.1, "itl": 0.0, "tpot": 0.0, "e2e": 0.1}
    assert count_within([Bound.parse("itl:1ms"), Bound.parse("ttft:100ms")], [latency]) == 1


@pytest.mark.parametrize("text", ["ttft", "ttft:5", "speed:5ms", "itl:-5ms", "itl:5min"])
def test_a_malformed_bound_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="LATENCY:TIME"):
        Bound.parse(text)


def test_a_busy_or_late_client_and_chunks_of_several_tokens_are_said():
    numbers = measured([Result(10.0, [sample(lag=0.02)], 0.95)], ()).numbers
    lines = case_lines({"name": "x", **numbers})
    assert any("busy 95%" in line and "--workers" in line for line in lines)
    assert any("20.0 ms late" in line for line in lines)
    assert any("--token-ids" in line for line in lines)
    quiet = "".join(case_lines({"name": "x", **case(sample(tokens=(1, 1, 1)))}))
    assert "--workers" not in quiet and "--token-ids" not in quiet


def test_a_curve_has_few_points_and_keeps_its_ends():
    values, shares = ecdf(np.arange(100_000.0))
    assert len(values) == len(shares) <= 2000
    assert (values[0], values[-1], shares[-1]) == (0.0, 99_999.0, 1.0)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    cases = {"1 stream": latencies_of([sample()] * 3), "no gaps": latencies_of([sample(times=(10.1,), tokens=(1,))])}
    draw(cases, "tiny", tmp_path / f"x.{suffix}")
    assert (tmp_path / f"x.{suffix}").stat().st_size > 5000


def test_without_matplotlib_the_remedy_is_said(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(BenchError, match=r"pip install matplotlib"):
        require_matplotlib()


def test_the_name_that_a_server_gives_its_model_steers_no_terminal(capsys):
    said = {"model": "m\x1b[31m", "url": "http://x", "hardware": None, "start_to_ready_s": None, "cases": []}
    print_report(said | {"endpoint": "completions", "prompt_tokens": 1, "max_tokens": 1})
    assert r"m\x1b[31m" in capsys.readouterr().out
