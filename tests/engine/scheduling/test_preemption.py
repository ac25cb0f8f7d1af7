"""A request that is put out and computed again answers as it does alone, whatever it asks for."""

from __future__ import annotations

import importlib.util
import random

import pytest
from engines import Answer, assert_nothing_held, drain, make_core, request
from leyden.engine.core import EngineCore
from leyden.engine.messages import AddRequest
from leyden.engine.outputs import TokenLogprobs
from tiny_models import random_prompt

BEGINNING = random_prompt(31, seed=1)
OPTIONS = {
    "top_p": [0.9],
    "top_k": [5],
    "min_p": [0.1],
    "presence_penalty": [0.9, -0.5],
    "frequency_penalty": [0.7],
    "repetition_penalty": [1.4],
    "min_tokens": [2],
    "stop_token_ids": [tuple(range(0, 256, 9))],
    "logit_bias": [{65: 3.0, 66: -50.0, 67: 2.5}],
    "logprobs": [0, 3],
    "prompt_logprobs": [2],
    "prefix_cache": [False],
    "grammar": ["start: /[a-z]{3,9}/\n"] if importlib.util.find_spec("llguidance") else [],
}


def asked(rng: random.Random, name: int) -> AddRequest:
    """A request of a few random wishes. What it shares with others is `BEGINNING` or nothing."""
    own = [name, *random_prompt(rng.randint(0, 50), seed=rng.randint(0, 9999))]
    prompt = BEGINNING + own if rng.random() < 0.6 else own
    params = {"temperature": rng.choice([0.0, 0.8, 1.3]), "seed": rng.randint(0, 99), "max_tokens": rng.randint(2, 16)}
    wishes = rng.sample([wish for wish, values in OPTIONS.items() if values], k=rng.randint(0, 4))
    return request(str(name), prompt, **params, **{wish: rng.choice(OPTIONS[wish]) for wish in wishes})


def warm(core: EngineCore) -> None:
    """Let the cache hold `BEGINNING` and nothing else."""
    core.scheduler.cache.clear()
    drain(core, request("warm", BEGINNING, max_tokens=1))


def drain_with_preemptions(core: EngineCore, requests: list[AddRequest], rng: random.Random) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for each in requests:
        core.add_request(each)
    num_left = 25
    while core.has_work:
        for output in core.step():
            answers.setdefault(output.request_id, Answer()).add(output)
        if core.scheduler.running and num_left and rng.random() < 0.5:
            core.scheduler.preemption.preempt(rng.choice(core.scheduler.running))
            num_left -= 1
        core.check_integrity()
    assert_nothing_held(core)
    return answers


def numbers(entries: list[TokenLogprobs | None] | None) -> list[float]:
    """All that is said of some tokens' log-probabilities."""
    said = [(e.token_id, e.logprob, *sorted(value for _, value in e.top)) for e in entries or () if e is not None]
    return [number for entry in said for number in entry]


@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize(
    "settings",
    [{"linear_backend": "minimax"}, {"linear_backend": "replay"}, {"speculative_tokens": 3}],
    ids=["minimax", "replay", "drafts"],
)
def test_any_request_answers_after_preemptions_as_it_does_alone(tiny, settings, lags):
    rng = random.Random(f"{settings} {lags}")
    core = make_core(tiny.folder, async_scheduling=lags, max_num_batched_tokens=16, snapshot_min_tokens=1, **settings)
    for _ in range(3):
        requests = [asked(rng, name) for name in range(5)]
        alone: dict[str, Answer] = {}
        for each in requests:
            warm(core)
            alone |= drain(core, each)
        warm(core)
        before = core.stats()
        together = drain_with_preemptions(core, requests, rng)
        after = core.stats()
        assert after.preemptions_total - before.preemptions_total > 3
        for each in requests:
            got, expected = together[each.request_id], alone[each.request_id]
            assert got.token_ids == expected.token_ids, each.sampling_params
            assert (got.finish_reason, got.stop_token_id) == (expected.finish_reason, expected.stop_token_id)
            assert got.num_cached_tokens == expected.num_cached_tokens, "usage"
            assert numbers(got.logprobs) == pytest.approx(numbers(expected.logprobs), abs=2e-4)
            assert numbers(got.prompt_logprobs) == pytest.approx(numbers(expected.prompt_logprobs), abs=2e-4)
        looked = [r for r in requests if r.prefix_cache and r.sampling_params.prompt_logprobs is None]
        queried = after.prefix_cache_queries_total - before.prefix_cache_queries_total
        assert queried == sum(len(r.prompt_token_ids) for r in looked)
        hits = after.prefix_cache_hits_total - before.prefix_cache_hits_total
        assert hits == sum(answer.num_cached_tokens for answer in together.values()) > 0
