"""`leyden bench http`: a server under load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import msgspec

from .client import Sample
from .errors import BenchError
from .flags import Span
from .host import own_server
from .load import Load
from .machine import hardware
from .plan import Background, Case, Plan
from .report import Latencies, background_numbers, measured
from .target import Target
from .workers import Result, Share, Workers, default_workers

TIMEOUT_SECONDS = 30.0
WARM_UP_TOKENS = 8
WARM_UP_STREAMS = 8  # when requests arrive by themselves
ENDLESS = 1 << 40


@contextlib.contextmanager
def serving(url: str | None, api_key: str | None, model: str, serve_args: str) -> Iterator[tuple[Target, float | None]]:
    """The server to measure, and the seconds of its start. These are None for a server that runs already."""
    if url is not None:
        yield Target.parse(url, api_key), None
        return
    with own_server(model, serve_args) as (own_url, ready):
        yield Target.parse(own_url, api_key), ready


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


def served_models(target: Target) -> dict[str, int | None]:
    """The served models by name, each with its context in tokens, or None where the server does not tell it.

    Raises `BenchError` when the server does not answer, or answers no list of at least one model.
    """
    try:
        response = httpx.get(f"{target.url}/v1/models", headers=target.headers, timeout=TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        raise BenchError(f"no server at {target.url} ({error}); start one, or leave --url out") from None
    if response.status_code != 200:
        raise BenchError(f"{target.url}/v1/models answers {response.status_code}; is --api-key right?")
    try:
        cards = msgspec.json.decode(response.content, type=_Cards).data
    except msgspec.MsgspecError:
        raise BenchError(
            f"{target.url}/v1/models answers no list of models; is --url that of an OpenAI-compatible server?"
        ) from None
    if not cards:
        raise BenchError(f"{target.url}/v1/models lists no model; name one with --model")
    return {card.id: card.max_model_len for card in cards}


def measure_serving(target: Target, plan: Plan) -> tuple[dict[str, Any], dict[str, Latencies]]:
    """Measure every case. Returns the report, and the latencies [s] by the case's name. Raises `BenchError`."""
    num_workers = plan.num_workers or default_workers(plan.largest_load)
    workers = Workers(num_workers, has_background=plan.has_background)
    try:
        cases, latencies = [], {}
        for number, case in enumerate(plan.cases):
            numbers, latencies[case.name] = _measure_case(workers, target, plan, case, number)
            cases.append(numbers)
    finally:
        workers.close()
    return _settings_of(target, plan) | {"cases": cases}, latencies


def _settings_of(target: Target, plan: Plan) -> dict[str, Any]:
    """The plan's settings, as the report repeats them."""
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
    workers: Workers, target: Target, plan: Plan, case: Case, number: int
) -> tuple[dict[str, Any], Latencies]:
    _warm_up(workers, target, plan, case.load, number)
    share = Share(target, replace(plan.workload, name=f"case {number}"), case.load, plan.timeout)
    background = None if case.background is None else _background_share(share, case.background, number)
    results, behind = workers.run(share, background)
    found = measured(results, plan.bounds)
    numbers = {"name": case.name, "concurrency": case.load.concurrency, "rate": case.load.rate, **found.numbers}
    if sum(numbers["errors"].values()) == numbers["requests"]:
        samples = [sample for result in results for sample in result.samples]
        raise BenchError(f"{case.name}: no request was answered ({numbers['errors']}){_server_message(samples)}")
    if behind is not None and case.background is not None:
        _require_background(case.name, behind)
        numbers["background"] = {
            "rate": case.background.rate,
            "prompt_tokens": str(case.background.prompt_tokens),
            "max_tokens": str(case.background.max_tokens),
            **background_numbers(behind),
        }
    return numbers, found.latencies


def _require_background(case: str, behind: Result) -> None:
    """Raise `BenchError` if all background requests failed: the case would have been measured beside nothing."""
    errors = [sample.error for sample in behind.samples if sample.error is not None]
    if errors and len(errors) == len(behind.samples):
        raise BenchError(
            f"{case}: all {len(errors)} background requests failed, the first with {errors[0]!r}"
            f"{_server_message(behind.samples)}; do --background-prompt-tokens and --background-max-tokens fit the "
            "context?"
        )


def _server_message(samples: list[Sample]) -> str:
    """The server's own message for its first failure, as the end of an error's message."""
    message = next((sample.message for sample in samples if sample.message), None)
    return "" if message is None else f"; the server says: {message}"


def _warm_up(workers: Workers, target: Target, plan: Plan, load: Load, number: int) -> None:
    """Run rounds of short answers on as many streams as the case has, and drop their samples."""
    streams = load.concurrency or WARM_UP_STREAMS
    low, high = min(plan.workload.max_tokens.low, WARM_UP_TOKENS), min(plan.workload.max_tokens.high, WARM_UP_TOKENS)
    for round_number in range(plan.warm_up_rounds):
        name = f"warm-up {number}.{round_number}"
        workload = replace(plan.workload, name=name, max_tokens=Span(low, high))
        workers.run(Share(target, workload, Load(streams, concurrency=streams), plan.timeout))


def _background_share(share: Share, background: Background, number: int) -> Share:
    workload = replace(
        share.workload,
        name=f"background {number}",
        prompt_tokens=background.prompt_tokens,
        max_tokens=background.max_tokens,
    )
    return replace(share, workload=workload, load=Load(ENDLESS, rate=background.rate), is_endless=True)
