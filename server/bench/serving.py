"""`leyden bench http`: a server under load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx

from .errors import BenchError
from .flags import Span
from .host import own_server
from .load import Load
from .machine import hardware
from .plan import Plan
from .report import Latencies, background_numbers, measured
from .target import Target
from .workers import Share, Workers, default_workers

TIMEOUT_SECONDS = 30.0
WARM_UP_TOKENS = 8
WARM_UP_STREAMS = 8  # when requests arrive by themselves
ENDLESS = 1 << 40


@contextlib.contextmanager
def serving(url: str | None, api_key: str | None, model: str, serve_args: str) -> Iterator[tuple[Target, float | None]]:
    """The server to measure, and the seconds it took to start if it was started here."""
    if url is not None:
        yield Target.parse(url, api_key), None
        return
    with own_server(model, serve_args) as (own_url, ready):
        yield Target.parse(own_url, api_key), ready


def first_model(target: Target) -> str:
    """The first name that the server serves. Raises `BenchError` when it does not answer."""
    try:
        response = httpx.get(f"{target.url}/v1/models", headers=target.headers, timeout=TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        raise BenchError(f"no server at {target.url} ({error}); start one, or leave --url out") from None
    if response.status_code != 200:
        raise BenchError(f"{target.url}/v1/models answers {response.status_code}; is --api-key right?")
    return response.json()["data"][0]["id"]


def measure_serving(target: Target, plan: Plan) -> tuple[dict[str, Any], dict[str, Latencies]]:
    """The numbers of every case, and the latencies behind them by the case's name. Raises `BenchError`."""
    largest = max(load.concurrency or load.rate or 0 for load in plan.loads)
    num_workers = plan.num_workers or default_workers(largest)
    workers = Workers(num_workers, has_background=plan.background is not None)
    try:
        cases, latencies = [], {}
        for number, load in enumerate(plan.loads):
            case, latencies[load.name] = _measure_case(workers, target, plan, load, number)
            cases.append(case)
    finally:
        workers.close()
    return _told(target, plan) | {"cases": cases}, latencies


def _told(target: Target, plan: Plan) -> dict[str, Any]:
    """What was asked for."""
    workload = plan.workload
    return {
        "model": workload.model,
        "url": target.url,
        "hardware": hardware() if target.is_local else None,
        "endpoint": workload.endpoint,
        "prompt": workload.prompt_kind,
        "prompt_tokens": str(workload.prompt_tokens),
        "max_tokens": str(workload.max_tokens),
        "temperature": workload.temperature,
        "ignore_eos": workload.ignore_eos,
        "seed": workload.seed,
    }


def _measure_case(
    workers: Workers, target: Target, plan: Plan, load: Load, number: int
) -> tuple[dict[str, Any], Latencies]:
    _warm_up(workers, target, plan, load, number)
    workload = replace(plan.workload, name=f"case {number}")
    background = _background_share(target, plan, number)
    results, behind = workers.run(Share(target, workload, load, plan.timeout), background)
    case = measured(results, plan.bounds)
    numbers = {"name": load.name, "concurrency": load.concurrency, "rate": load.rate, **case.numbers}
    if sum(numbers["errors"].values()) == numbers["requests"]:
        raise BenchError(f"{load.name}: no request was answered ({numbers['errors']})")
    if behind is not None and plan.background is not None:
        numbers["background"] = {"rate": plan.background.rate, **background_numbers(behind)}
    return numbers, case.latencies


def _warm_up(workers: Workers, target: Target, plan: Plan, load: Load, number: int) -> None:
    """Rounds of short answers on as many streams as the case has; nothing of them is counted."""
    streams = load.concurrency or WARM_UP_STREAMS
    low, high = min(plan.workload.max_tokens.low, WARM_UP_TOKENS), min(plan.workload.max_tokens.high, WARM_UP_TOKENS)
    for round_number in range(plan.warm_up_rounds):
        name = f"warm-up {number}.{round_number}"
        workload = replace(plan.workload, name=name, max_tokens=Span(low, high))
        workers.run(Share(target, workload, Load(streams, concurrency=streams), plan.timeout))


def _background_share(target: Target, plan: Plan, number: int) -> Share | None:
    if plan.background is None:
        return None
    workload = replace(
        plan.workload,
        name=f"background {number}",
        prompt_tokens=plan.background.prompt_tokens,
        max_tokens=plan.background.max_tokens,
    )
    return Share(target, workload, Load(ENDLESS, rate=plan.background.rate), plan.timeout, is_endless=True)
