"""Layers that keep different things: what the engine keeps, copies, moves and saves gives the tokens that computing
everything again gives."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from engines import answer, drain, request
from leyden.engine.errors import ConfigError
from leyden.engine.messages import SessionCall
from mixed_layers import MODELS, WITHOUT_SHIFT, install
from tiny_models import random_prompt

SHARED = random_prompt(150, seed=0)
CASES = [(model, backend) for model, (_, backends) in MODELS.items() for backend in backends]


@pytest.fixture(params=CASES, ids=", ".join)
def case(request) -> tuple[str, str]:
    """A model, and the backend that computes it."""
    return request.param


@pytest.fixture
def make_core(monkeypatch, tmp_path, case):
    model, backend = case
    return functools.partial(install(monkeypatch, tmp_path / "model", MODELS[model][0]), linear_backend=backend)


@pytest.fixture
def recomputed(make_core):
    """Greedy tokens, each from a prompt of everything before it."""
    core = make_core(prefix_cache=False)

    def of(prompt: list[int], num_tokens: int) -> list[int]:
        found: list[int] = []
        for _ in range(num_tokens):
            found += answer(core, prompt + found, max_tokens=1).token_ids
        return found

    return of


def poison(core) -> None:
    """Everything that no sequence has written is NaN."""
    pools = core.runner.pools
    for tensor in (*pools.states.tensors, *pools.kv.tensors, *pools.snapshots.parts):
        tensor.fill_(torch.nan)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("gated delta", "gated_delta layers are computed by auto, chunk, replay or fla"),
        ("lightning and gated delta", "lightning and gated_delta layers are computed by auto or replay"),
    ],
)
def test_backend_that_lacks_a_linear_layer_is_refused_with_the_complete_ones(monkeypatch, tmp_path, model, told):
    make_core = install(monkeypatch, tmp_path, MODELS[model][0])
    with pytest.raises(ConfigError, match=f"^linear_backend = seg_la: the model's {told}$"):
        make_core(linear_backend="seg_la")
    assert make_core(linear_backend="auto").info.linear_backend == "replay"


def test_answers_are_no_one_token_over_and_over(recomputed):
    assert len(set(recomputed(SHARED, 8))) > 3


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7}, {"async_scheduling": True}], ids=str)
def test_chunks_and_decode_rows_give_the_tokens_of_a_recomputation(make_core, recomputed, settings):
    core = make_core(**settings)
    poison(core)
    prompts = [random_prompt(length, seed=length) for length in (1, 3, 17, 70)]
    answers = drain(core, *(request(str(i), prompt, max_tokens=8) for i, prompt in enumerate(prompts)))
    assert [answers[str(i)].token_ids for i in range(4)] == [recomputed(prompt, 8) for prompt in prompts]


def test_choices_of_a_prompt_fork_every_part(make_core, recomputed):
    core = make_core()
    poison(core)
    siblings = [request(f"c{i}", SHARED, max_tokens=8, sibling_of="c0") for i in (1, 2)]
    answers = drain(core, request("c0", SHARED, max_tokens=8, num_siblings=2), *siblings)
    assert {tuple(answers[f"c{i}"].token_ids) for i in range(3)} == {tuple(recomputed(SHARED, 8))}


@pytest.mark.parametrize("on_host", [0.0, 0.001], ids=["device", "host"])
@pytest.mark.parametrize("interval", [0, 8], ids=["at stops", "on the way"])
def test_a_snapshot_resumes_every_part(make_core, recomputed, on_host, interval):
    core = make_core(
        snapshots=1 if on_host else 16,
        host_snapshot_gb=on_host,
        snapshot_min_tokens=4,
        snapshot_interval=interval,
    )
    poison(core)
    answer(core, SHARED, max_tokens=4)
    others = [SHARED[:at] + random_prompt(9, seed=at) for at in (13, 70, 140)]
    for prompt in others * 2:
        assert answer(core, prompt, max_tokens=6).token_ids == recomputed(prompt, 6)
    assert core.stats().prefix_cache_hits_total >= 3 * len(others[0])
    assert core.stats().host_snapshots_used > 0 or not on_host


@pytest.mark.parametrize("seed", range(3))
def test_preempted_sequences_and_snapshots_anywhere(make_core, recomputed, seed):
    rng = random.Random(seed)
    core = make_core(
        num_kv_blocks=11,
        block_size=8,
        max_num_batched_tokens=rng.choice([16, 24]),
        snapshots=rng.choice([2, 5]),
        host_snapshot_gb=rng.choice([0.0, 0.001]),
        snapshot_min_tokens=4,
        snapshot_interval=rng.choice([8, 4096]),
        async_scheduling=rng.choice([False, True]),
    )
    poison(core)
    prompts = [SHARED[: rng.randint(0, 30)] + random_prompt(rng.randint(1, 9), seed=i) for i in range(6)]
    answers = drain(core, *(request(str(i), prompt, max_tokens=20) for i, prompt in enumerate(prompts)))
    for i, prompt in enumerate(prompts):
        assert answers[str(i)].token_ids == recomputed(prompt, 20), i
    assert core.stats().preemptions_total > 0


def test_drafts_of_layers_that_differ_are_verified(monkeypatch, tmp_path, case):
    model, backend = case
    mixers = WITHOUT_SHIFT if model == "lightning" else MODELS[model][0]  # the toy keeps no ring of its own
    make_core = functools.partial(install(monkeypatch, tmp_path / "model", mixers), linear_backend=backend)
    expected = answer(make_core(prefix_cache=False), SHARED, max_tokens=30).token_ids

    def propose(sequence, count):
        """Two tokens that are right, and one that is not."""
        known = sequence.num_output_tokens - sequence.ends_in_unseen
        return [*expected[known : known + 2], 1][:count] if count > 0 else []

    core = make_core(speculative_tokens=4)
    poison(core)
    core.scheduler.speculation._propose = propose
    assert answer(core, SHARED, max_tokens=30).token_ids == expected
    assert 0 < core.stats().accepted_tokens_total < core.stats().draft_tokens_total


def test_prompt_resumes_at_the_last_rung_where_all_layers_can_save(make_core, recomputed, case):
    """Nothing waits for a stop: the second prompt is unknown until the first is done."""
    core = make_core(snapshot_min_tokens=16, snapshot_interval=16)
    poison(core)
    answer(core, SHARED, max_tokens=1)
    prompt = SHARED[:120] + random_prompt(5, seed=1)
    found = core.stats().prefix_cache_hits_total
    assert answer(core, prompt, max_tokens=6).token_ids == recomputed(prompt, 6)
    assert core.stats().prefix_cache_hits_total - found == (64 if "delta" in case[0] else 112)


def call(core, action: str):
    core.sessions.add(SessionCall("1", action, "a"))
    while True:
        for done in core.sessions.advance():
            core.check_integrity()
            return done


@pytest.mark.parametrize("num_snapshots", [1, 8], ids=["the last state alone", "both states"])
def test_a_session_brings_every_part_back(make_core, recomputed, tmp_path, num_snapshots):
    settings = {"session_folder": tmp_path / "saved", "snapshot_min_tokens": 8}
    core = make_core(**settings)
    conversation = SHARED + answer(core, SHARED, max_tokens=12, session_id="a").token_ids
    assert call(core, "save").error_code is None
    again = make_core(block_size=8, snapshots=num_snapshots, **settings)
    poison(again)
    assert call(again, "restore").error_code is None
    prompt = conversation + random_prompt(7, seed=2)
    assert answer(again, prompt, max_tokens=8).token_ids == recomputed(prompt, 8)
    assert again.stats().prefix_cache_hits_total >= len(conversation) - 1
