"""Profiles of engine steps: what is counted, and what a trace is made into."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from engines import assert_nothing_held, make_core
from leyden.benchmarks.load.errors import BenchError
from leyden.benchmarks.load.profile import (
    DECODE_STEPS,
    busy_time,
    print_profile,
    profile_decode,
    profile_prefill,
    self_times,
    short_name,
    tabulate,
    tokens_to_profile,
)
from tiny_models import FULL, LINEAR, save_minimax

NUM_LAYERS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_minimax(folder, layer_types=(LINEAR, FULL))
    return folder


def event(name: str, ts: float, dur: float, tid: int = 1) -> dict:
    return {"name": name, "ts": ts, "dur": dur, "tid": tid}


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["synchronous", "asynchronous"])
def test_a_decode_profile_holds_whole_steps_and_leaves_the_engine_empty(checkpoint, tmp_path, async_scheduling):
    core = make_core(checkpoint, async_scheduling=async_scheduling)
    report = profile_decode(core, 3, 20, tmp_path)
    assert_nothing_held(core)
    calls = {row.name: row.calls for row in report.operations}
    assert calls["rms_norm"] == pytest.approx(round(calls["rms_norm"])) and calls["rms_norm"] >= 2 * NUM_LAYERS
    assert sum(row.us for row in report.operations) == pytest.approx(report.device_us)
    assert sum(row.share for row in report.operations) == pytest.approx(1.0)
    assert report.idle_us == pytest.approx(report.wall_us - report.device_us)
    assert 0 < report.device_us < report.wall_us
    with gzip.open(tmp_path / report.trace, "rt") as trace:
        assert json.load(trace)["traceEvents"]
    table = json.loads((tmp_path / report.trace.replace("trace.json.gz", "table.json")).read_text())
    assert (table["steps"], table["operations"][0]["name"]) == (DECODE_STEPS, report.operations[0].name)


def test_a_prefill_profile_is_one_step_as_full_as_it_can_be(checkpoint, tmp_path, capfd):
    core = make_core(checkpoint, max_num_batched_tokens=48)
    report = profile_prefill(core, 20, tmp_path)
    assert_nothing_held(core)
    assert (report.name, report.steps) == ("prefill, 48 tokens of 3 prompts", 1)
    print_profile(report)
    out, err = capfd.readouterr()
    _, name, heading, *rows = out.splitlines()
    assert name.startswith(report.name) and heading.split() == ["calls", "µs", "per", "step", "share", "operation"]
    assert "rms_norm" in out and rows[-1].endswith(" others")
    assert all(re.match(r" +[\d.e+]+ +[\d.]+ +[\d.]+%  ", row) for row in rows), "one table"
    assert "Profiler" not in err, "the profiler's library writes nothing of its own"


def test_a_batch_that_does_not_stay_together_is_refused(checkpoint, tmp_path):
    core = make_core(checkpoint, max_num_seqs=2)
    with pytest.raises(BenchError, match="did not all run"):
        profile_decode(core, 3, 20, tmp_path)


def test_room_to_profile_is_enough_when_prompts_arrive_in_many_steps(checkpoint, tmp_path):
    needed = tokens_to_profile(4, 30, 16)
    core = make_core(checkpoint, max_num_batched_tokens=16, max_model_len=30 + needed)
    assert profile_decode(core, 4, 30, tmp_path).steps == DECODE_STEPS


def test_overlapping_kernels_are_busy_once():
    events = [event("b", 2, 4), event("a", 0, 3), event("in b", 3, 1), event("c", 10, 5)]
    assert busy_time(events) == 6 + 5
    assert busy_time([event("long", 0, 10), event("within", 1, 2), event("within, later", 5, 3)]) == 10
    assert busy_time([]) == 0


def test_a_call_keeps_the_time_that_is_not_within_another():
    events = [event("outer", 0, 10), event("inner", 1, 4), event("innermost", 2, 1), event("next", 6, 2)]
    events += [event("elsewhere", 3, 2, tid=2), event("after", 10, 5)]
    assert sorted(self_times(reversed(events))) == [
        ("after", 5), ("elsewhere", 2), ("inner", 3), ("innermost", 1), ("next", 2), ("outer", 4)
    ]  # fmt: skip


def test_the_table_is_per_step_and_the_longest_comes_first():
    durations = [("void at::small<int>(int)", 1.0)] * 4 + [("big", 6.0), ("big", 10.0)]
    big, small = tabulate(durations, steps=2)
    assert (big.name, big.calls, big.us, big.share) == ("big", 1.0, 8.0, 0.8)
    assert (small.name, small.calls, small.us, small.share) == ("small<int>", 2.0, 2.0, 0.2)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_decode_kernel", "_decode_kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
        ("void at::native::(anonymous namespace)::fill<float>(float*, int)", "fill<float>"),
        ("void f<at::G(int), 4>(at::G(int))", "f<G(int), 4>"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT"),
    ],
)
def test_names_are_cut_to_what_tells_kernels_apart(name, short):
    assert short_name(name) == short
    assert len(short_name("x" * 500)) <= 90
