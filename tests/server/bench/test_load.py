"""What is asked and when follows from the seed, however many processes share it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import islice

import pytest
from leyden.benchmarks.load.flags import Span, number, positive, positive_number, setting
from leyden.benchmarks.load.load import Load, Workload, poisson_arrivals
from leyden.benchmarks.load.target import Target
from leyden.benchmarks.load.workers import Share, default_workers

WORKLOAD = Workload("completions", "m", "ids", Span(3, 9), Span(2, 5), 50, 0.0, True, False, seed=1)
TARGET = Target("127.0.0.1", 80, False, "", None)


def test_poisson_arrivals_have_the_rate_they_are_given_and_its_spread():
    times = list(islice(poisson_arrivals(5.0, "seed"), 20000))
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.04, rel=0.06)  # exponential: mean^2
    assert min(gaps) >= 0


def test_arrivals_repeat_with_the_seed_and_differ_with_another():
    first, again, other = (list(islice(poisson_arrivals(5.0, seed), 50)) for seed in ("a", "a", "b"))
    assert first == again != other


def test_requests_repeat_with_the_seed_and_differ_by_index_case_and_seed():
    request = WORKLOAD.request(4)
    assert request == WORKLOAD.request(4)
    others = [WORKLOAD.request(5), replace(WORKLOAD, name="x").request(4), replace(WORKLOAD, seed=2).request(4)]
    assert all(other.body["prompt"] != request.body["prompt"] for other in others)


def test_lengths_fill_their_spans_and_ids_stay_in_the_vocabulary():
    requests = [WORKLOAD.request(i) for i in range(300)]
    assert {len(request.body["prompt"]) for request in requests} == set(range(3, 10))
    assert {request.body["max_tokens"] for request in requests} == {2, 3, 4, 5}
    assert all(request.max_tokens == request.body["max_tokens"] for request in requests)
    assert {token_id for request in requests for token_id in request.body["prompt"]} == set(range(50))


def test_endpoints_and_prompt_kinds_have_their_bodies():
    text = replace(WORKLOAD, prompt_kind="text").request(0).body
    assert 3 <= len(text["prompt"].split()) <= 9
    chat = replace(WORKLOAD, endpoint="chat", prompt_kind="text", ignore_eos=False).request(0).body
    assert chat["messages"][0]["role"] == "user"
    assert not {"prompt", "ignore_eos", "skip_special_tokens"} & set(chat)
    assert (text["ignore_eos"], text["skip_special_tokens"]) == (True, False)
    assert "return_token_ids" not in chat
    assert replace(WORKLOAD, wants_token_ids=True).request(0).body["return_token_ids"] is True


@pytest.mark.parametrize("load", [Load(23, concurrency=5), Load(3, concurrency=8), Load(23, rate=2.0)], ids=str)
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_share_every_request_and_arrival_once(load, num_workers):
    shares = [Share(TARGET, WORKLOAD, load, 1.0, rank, num_workers) for rank in range(num_workers)]
    indices = sorted(request.index for share in shares for request in share.requests())
    assert indices == list(range(load.num_requests))
    if load.rate is None:
        assert sum(share.streams for share in shares) == load.concurrency
        assert all(share.streams for share in shares if list(share.requests()))
    else:
        seen = sorted(at for share in shares for at in islice(share.arrivals(), len(list(share.requests()))))
        assert seen == list(islice(poisson_arrivals(2.0, "1/"), load.num_requests))


def test_a_worker_gets_the_requests_of_its_streams_and_no_stream_waits_for_another_worker():
    shares = [Share(TARGET, WORKLOAD, Load(30, concurrency=3), 1.0, rank, 2) for rank in range(2)]
    assert [(share.streams, len(list(share.requests()))) for share in shares] == [(2, 20), (1, 10)]


def test_a_worker_per_sixteen_streams_within_bounds(monkeypatch):
    monkeypatch.setattr("leyden.benchmarks.load.workers.num_cores", lambda: 32)
    assert [default_workers(load) for load in (0.5, 1, 16, 33, 64, 256)] == [1, 1, 1, 2, 4, 8]
    monkeypatch.setattr("leyden.benchmarks.load.workers.num_cores", lambda: 2)
    assert default_workers(256) == 1


@pytest.mark.parametrize(
    ("parse", "text"),
    [(Span.parse, "0"), (Span.parse, "5:4"), (Span.parse, "a"), (Span.parse, "1:2:3"), (positive, "0"), (positive, "x")]
    + [(positive_number, text) for text in ("0", "-1", "inf", "nan", "x")]
    + [(number, "-0.1"), (setting, "key"), (setting, "=1")],
)
def test_a_wrong_value_is_refused_by_name(parse, text):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        parse(text)
