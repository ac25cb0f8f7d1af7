"""Several answers to one prompt: it is computed once, and every answer is what it would have been alone."""

from __future__ import annotations

import functools
import time

import engines
import pytest
import torch
from backends import BACKENDS
from engines import DEVICE, answer, assert_nothing_held, drain, request
from leyden.engine.core import EngineCore
from leyden.engine.scheduling.siblings import PATIENCE
from leyden.engine.text import grammar
from tiny_models import random_prompt

make_core = functools.partial(engines.make_core, device=DEVICE)
PROMPT = random_prompt(37, seed=1)
N = 4


def choices(prompt=PROMPT, n=N, **params):
    """The requests that a server makes of one with `n`."""
    asked = {"temperature": 1.0, "max_tokens": 12} | params
    first = request("c0", prompt, num_siblings=n - 1, seed=0, **asked)
    return [first, *(request(f"c{i}", prompt, sibling_of="c0", seed=i, **asked) for i in range(1, n))]


def computed_tokens(core: EngineCore) -> list[int]:
    """Grows by the number of prompt tokens of every step that is launched."""
    launch, counts = core.launcher.launch, []

    def counting(batch):
        counts.append(sum(batch.num_scheduled_tokens[: batch.num_prefills]))
        return launch(batch)

    core.launcher.launch = counting
    return counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize("length", [1, 2, 17, 37])
def test_choice_beside_others_is_the_choice_alone(tiny, backend, lags, length):
    core = make_core(tiny.folder, linear_backend=backend, async_scheduling=lags)
    prompt = random_prompt(length, seed=length)
    alone = [answer(core, prompt, temperature=1.0, max_tokens=12, seed=i).token_ids for i in range(N)]
    assert len({tuple(ids) for ids in alone}) == N
    counts = computed_tokens(core)
    together = drain(core, *choices(prompt))
    assert [together[f"c{i}"].token_ids for i in range(N)] == alone
    assert sum(counts) == (N if length == 1 else length - 1), "tokens of prompts that were computed"


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_prompt_in_chunks_beside_others(tiny, chunk):
    core = make_core(tiny.folder, max_num_batched_tokens=chunk + 8, max_num_seqs=8, mixed_prefill_tokens=chunk)
    expected = [answer(core, PROMPT, temperature=1.0, max_tokens=12, seed=i).token_ids for i in range(N)]
    other = request("other", random_prompt(9, seed=2), max_tokens=30)
    answers = drain(core, other, *choices())
    assert [answers[f"c{i}"].token_ids for i in range(N)] == expected


def test_choices_that_find_no_slot_compute_for_themselves(tiny):
    core = make_core(tiny.folder, max_num_seqs=3)
    expected = [answer(core, PROMPT, temperature=1.0, max_tokens=12, seed=i).token_ids for i in range(6)]
    counts = computed_tokens(core)
    answers = drain(core, *choices(n=6))
    assert [answers[f"c{i}"].token_ids for i in range(6)] == expected
    assert sum(counts) == 36 + 3 * 37


def test_choices_that_are_preempted_come_to_the_same(tiny):
    core = make_core(tiny.folder, num_kv_blocks=12, block_size=4, max_num_seqs=4)
    roomy = make_core(tiny.folder)
    prompt = PROMPT[:9]
    expected = [answer(roomy, prompt, temperature=1.0, max_tokens=20, seed=i).token_ids for i in range(N)]
    answers = drain(core, *choices(prompt, max_tokens=20))
    assert core.stats().preemptions_total > 0
    assert [answers[f"c{i}"].token_ids for i in range(N)] == expected


@pytest.mark.parametrize("gone", ["c0", "c2"])
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_one_that_is_aborted_leaves_the_others_alone(tiny, gone, steps):
    core = make_core(tiny.folder, max_num_batched_tokens=16)
    expected = [answer(core, PROMPT, temperature=1.0, max_tokens=12, seed=i).token_ids for i in range(N)]
    for each in choices():
        core.add_request(each)
    found: dict[str, list[int]] = {f"c{i}": [] for i in range(N)}

    def step() -> None:
        for output in core.step():
            found[output.request_id] += output.token_ids
        core.check_integrity()

    for _ in range(steps):
        step()
    core.abort_request(gone)
    steps = 0
    while core.has_work:
        step()
        steps += 1
    assert steps < 30, "somebody waited for the one that is gone"
    assert all(found[f"c{i}"] == expected[i] for i in range(N) if f"c{i}" != gone)
    assert_nothing_held(core)


def test_an_announced_sibling_that_never_comes_is_waited_for_a_while(tiny, monkeypatch):
    core = make_core(tiny.folder)
    pauses: list[float] = []
    monkeypatch.setattr("leyden.engine.core.time.sleep", pauses.append)
    alone = answer(core, PROMPT, temperature=1.0, max_tokens=12, seed=0)
    core.add_request(choices()[0])
    steps, ids = 0, []
    while core.has_work:
        ids += [token for output in core.step() for token in output.token_ids]
        steps += 1
    assert ids == alone.token_ids and PATIENCE < steps < PATIENCE + 20
    assert len(pauses) >= PATIENCE - 2, "a processor that has nothing to do is left to those who send siblings"


@pytest.mark.parametrize("params", [{"prompt_logprobs": 2}, {"max_tokens": 0}, {"max_tokens": 0, "prompt_logprobs": 0}])
def test_choices_with_prompts_of_their_own_do_not_wait(tiny, params):
    core = make_core(tiny.folder)
    alone = answer(core, PROMPT, **({"temperature": 1.0, "max_tokens": 12, "seed": 0} | params))
    assert drain(core, *choices(**params), max_steps=30)["c0"].token_ids == alone.token_ids


@pytest.mark.parametrize("late", [0, 3], ids=["they come together", "they come later"])
def test_a_choice_has_started_when_the_first_of_them_has(tiny, monkeypatch, late):
    """Its deadline passes while the prompt that it is to copy is being computed."""
    clock = [100.0]
    monkeypatch.setattr("leyden.engine.core.time.monotonic", lambda: clock[0])
    core = make_core(tiny.folder, max_num_batched_tokens=5, max_num_seqs=3)
    asked = choices(max_tokens=3)
    for each in asked:
        each.max_queue_seconds = 5.0
    core.add_request(asked[0])
    for _ in range(late):
        core.step()
    for each in asked[1:]:
        core.add_request(each)
    core.step()
    clock[0] += 6.0
    answers = drain(core)
    assert [answers[f"c{i}"].finish_reason for i in range(N)] == ["length"] * N, "the last finds no slot at first"


def test_choices_none_of_which_has_started_are_refused_together(tiny, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("leyden.engine.core.time.monotonic", lambda: clock[0])
    core = make_core(tiny.folder, max_num_seqs=1)
    core.add_request(request("before", PROMPT, max_tokens=30))
    for each in choices():
        each.max_queue_seconds = 5.0
        core.add_request(each)
    core.step()
    clock[0] += 6.0
    answers = drain(core)
    assert {name: each.finish_reason for name, each in answers.items()} == {"before": "length"} | dict.fromkeys(
        [f"c{i}" for i in range(N)], "error"
    )


@pytest.mark.parametrize(
    "changes",
    [{"prompt": PROMPT[:-1]}, {"prompt_logprobs": 2}, {"sibling_of": "nobody"}],
    ids=["another prompt", "scores of its own", "no such request"],
)
def test_prompt_that_cannot_be_shared_is_computed(tiny, changes):
    core = make_core(tiny.folder)
    prompt = changes.pop("prompt", PROMPT)
    asked = {"temperature": 1.0, "max_tokens": 12, "seed": 1}
    expected = answer(core, prompt, **asked)
    first = request("c0", PROMPT, max_tokens=12)
    answers = drain(core, first, request("c1", prompt, **({"sibling_of": "c0"} | asked | changes)))
    assert answers["c1"].token_ids == expected.token_ids


def test_copy_leaves_the_rest_as_garbage(tiny):
    """Only the prompt's blocks and the state are copied: what else lies in the pools must not matter."""
    core = make_core(tiny.folder)
    expected = [answer(core, PROMPT, temperature=1.0, max_tokens=12, seed=i).token_ids for i in range(N)]
    for pool in (*core.runner.pools.states.tensors, *core.runner.pools.kv.tensors):
        pool.fill_(torch.nan)
    answers = drain(core, *choices())
    assert [answers[f"c{i}"].token_ids for i in range(N)] == expected


def test_choices_that_a_grammar_constrains_compute_their_prompt_once(tiny, monkeypatch):
    pytest.importorskip("llguidance")
    compile_now = grammar.make_matcher
    monkeypatch.setattr(grammar, "make_matcher", lambda *asked: (time.sleep(0.02), compile_now(*asked))[1])
    core = make_core(tiny.folder)
    counts = computed_tokens(core)
    answers = drain(core, *choices(grammar="start: /[a-z]{3}/\n"))
    assert all(len(answers[f"c{i}"].token_ids) >= 3 and answers[f"c{i}"].finish_reason == "stop" for i in range(N))
    assert sum(counts) == len(PROMPT) - 1
