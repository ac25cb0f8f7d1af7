"""Drafts change how fast a text comes and nothing else."""

from __future__ import annotations

import functools
import random
from collections import Counter
from types import SimpleNamespace

import engines
import numpy as np
import pytest
import torch
from backends import BACKENDS
from engines import DEVICE, answer, drain, request, sequence
from leyden.engine.core import EngineCore
from leyden.engine.llm import LLM
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.scheduling.speculation import Speculation, can_draft, num_kept
from tiny_models import random_prompt

make_core = functools.partial(engines.make_core, device=DEVICE, max_model_len=256)
speculating = functools.partial(make_core, speculative_tokens=7)


class Oracle:
    """A proposer that knows what a sequence will say, and is wrong now and then."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], wrong: float, seed: int = 0) -> None:
        self.texts = texts
        self.wrong = wrong
        self.rng = random.Random(seed)

    def propose(self, each, count):
        if not can_draft(each.sampling_params) or count <= 0:
            return []
        answer, known = self.texts[tuple(each.prompt_token_ids)], each.num_output_tokens - each.ends_in_unseen
        drafts = answer[known : known + self.rng.randint(1, count)]
        return [(token + 1) % 60 if self.rng.random() < self.wrong else token for token in drafts]


def knowing(core: EngineCore, prompts: list[list[int]], wrong: float = 0.3, **params) -> EngineCore:
    """The core with an oracle for these prompts."""
    plain = make_core(core.runner.served.folder, prefix_cache=False)
    texts = {tuple(p): answer(plain, p, **params).token_ids for p in prompts}
    core.scheduler.speculation._propose = Oracle(texts, wrong).propose
    return core


def steps(core: EngineCore) -> int:
    return core.stats().steps_total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_is_the_same_with_drafts(tiny, backend, lags, wrong, temperature):
    prompt, params = random_prompt(21, seed=1), {"max_tokens": 60, "temperature": temperature, "seed": 3}
    core = speculating(tiny.folder, linear_backend=backend, async_scheduling=lags)
    knowing(core, [prompt], wrong, **params)
    expected = answer(make_core(tiny.folder, prefix_cache=False), prompt, **params)
    before = steps(core)
    found = answer(core, prompt, **params)
    assert found.token_ids == expected.token_ids and found.finish_reason == "length"
    stats = core.stats()
    assert stats.draft_tokens_total > 0
    if wrong == 0.0:
        assert stats.accepted_tokens_total == stats.draft_tokens_total and steps(core) - before < 30
    if wrong == 1.0:
        assert stats.accepted_tokens_total == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize("seed", range(3))
def test_neighbours_arrivals_aborts_and_preemption(tiny, backend, lags, seed):
    rng = random.Random(seed)
    prompts = [random_prompt(rng.randint(1, 30), seed=10 * seed + i) for i in range(6)]
    core = speculating(
        tiny.folder,
        linear_backend=backend,
        async_scheduling=lags,
        num_kv_blocks=rng.choice([16, 40]),
        block_size=rng.choice([4, 8]),
        max_num_seqs=4,
        max_num_batched_tokens=rng.choice([8, 64]),
        max_model_len=64,
        snapshot_min_tokens=rng.choice([1, 128]),
    )
    knowing(core, prompts, 0.2, max_tokens=30)
    alone = [answer(make_core(tiny.folder, prefix_cache=False), p, max_tokens=30).token_ids for p in prompts]
    victim = request("victim", prompts[0], max_tokens=30)
    core.add_request(victim)
    for _ in range(rng.randint(1, 8)):
        core.step()
    asked = [request(str(i), prompt, max_tokens=30) for i, prompt in enumerate(prompts)]
    for each in asked[:3]:
        core.add_request(each)
    answers = {}
    for _ in range(rng.randint(0, 6)):
        for output in core.step():
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    core.abort_request("victim")
    rest = drain(core, *asked[3:])
    for i in range(6):
        found = answers.get(str(i), []) + (rest[str(i)].token_ids if str(i) in rest else [])
        assert found == alone[i], i
    assert core.stats().accepted_tokens_total > 0


def test_a_stop_token_among_the_drafts_ends_the_text(tiny):
    prompt = random_prompt(21, seed=1)
    plain = answer(make_core(tiny.folder), prompt, max_tokens=40).token_ids
    stop = plain[17]
    expected = plain[: plain.index(stop) + 1]
    for lags in (False, True):
        core = speculating(tiny.folder, async_scheduling=lags, snapshot_min_tokens=1)
        knowing(core, [prompt], 0.0, max_tokens=40)
        found = answer(core, prompt, max_tokens=40, stop_token_ids=[stop])
        assert (found.token_ids, found.finish_reason, found.stop_token_id) == (expected, "stop", stop)
        again = prompt + expected + random_prompt(4, seed=9)  # what was kept of the answer is sound
        core.scheduler.speculation.max_drafts = 0
        before = core.stats().prefix_cache_hits_total
        reference = answer(make_core(tiny.folder, prefix_cache=False), again, max_tokens=8).token_ids
        assert answer(core, again, max_tokens=8).token_ids == reference
        assert core.stats().prefix_cache_hits_total - before >= len(prompt) + len(expected) - 1


def test_request_for_more_than_tokens_does_not_draft():
    plain = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=9)
    assert can_draft(plain)
    for more in (
        {"logprobs": 0},
        {"logit_bias": {1: 2.0}},
        {"min_tokens": 2},
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
        {"grammar": "start: /a/"},
    ):
        assert not can_draft(SamplingParams(**more)), more


def test_a_neighbour_that_does_not_draft_stays_as_it_is(tiny):
    prompts = [random_prompt(20, seed=1), random_prompt(20, seed=2)]
    core = speculating(tiny.folder)
    knowing(core, prompts, 0.0, max_tokens=40)
    plain = make_core(tiny.folder)
    penalised = {"max_tokens": 40, "repetition_penalty": 1.3, "logprobs": 2}
    alone = answer(plain, prompts[1], **penalised)
    both = drain(core, request("a", prompts[0], max_tokens=40), request("b", prompts[1], **penalised))
    assert both["b"].token_ids == alone.token_ids and both["b"].logprobs is not None
    assert both["a"].token_ids == answer(plain, prompts[0], max_tokens=40).token_ids
    assert [entry.token_id for entry in both["b"].logprobs] == alone.token_ids


def test_text_that_repeats_takes_fewer_steps_without_an_oracle():
    settings = {"device": DEVICE, "dtype": "float32", "max_num_seqs": 2, "cpu_memory_gb": 0.2, "num_threads": 1}
    plain, drafted = LLM("demo", **settings), LLM("demo", speculative_tokens=7, **settings)
    prompt = "Once upon a time there was a little red bird. Once upon a time there was"
    params = SamplingParams(temperature=0.0, max_tokens=120)
    expected, found = (llm.generate(prompt, params)[0] for llm in (plain, drafted))
    assert found.token_ids == expected.token_ids and found.text == expected.text
    assert drafted.core.stats().accepted_tokens_total > 20
    assert steps(drafted.core) < steps(plain.core) - 20


@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize(("max_tokens", "num_rows"), [(1, 1), (2, 1), (2, 2), (3, 2), (9, 4)])
def test_a_step_with_drafts_stays_within_its_budget(tiny, max_tokens, num_rows, lags):
    prompts = [random_prompt(7, seed=i) for i in range(num_rows)]
    settings = {"max_num_batched_tokens": max_tokens, "max_num_seqs": num_rows, "async_scheduling": lags}
    core = knowing(speculating(tiny.folder, **settings), prompts, 0.2, max_tokens=30)
    sizes, idle = [], 0
    schedule = core.scheduler.schedule

    def watched():
        nonlocal idle
        batch = schedule()
        sizes.append(sum(batch.num_scheduled_tokens))
        idle += batch.is_empty and core.scheduler.has_work
        return batch

    core.scheduler.schedule = watched
    found = drain(core, *(request(str(i), prompt, max_tokens=30) for i, prompt in enumerate(prompts)))
    texts = core.scheduler.speculation._propose.__self__.texts
    assert [found[str(i)].token_ids for i in range(num_rows)] == [texts[tuple(prompt)] for prompt in prompts]
    assert max(sizes) <= max_tokens
    if max_tokens == num_rows == 1:
        assert core.stats().draft_tokens_total == 0
        assert idle <= 1, "nobody waits for what there is no room for, but at last for the last token"
    else:
        assert core.stats().accepted_tokens_total > 0


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("max_model_len", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_an_engine_with_drafts_starts_whatever_its_blocks_and_its_context(tiny, block_size, max_model_len, num_slots):
    settings = {"block_size": block_size, "max_model_len": max_model_len, "max_num_seqs": num_slots}
    core = speculating(tiny.folder, **settings, cpu_memory_gb=0.01)
    if max_model_len > 1:
        assert len(answer(core, [1], max_tokens=max_model_len - 1).token_ids) == max_model_len - 1


def test_many_rows_bring_no_drafts(tiny):
    core = speculating(tiny.folder, max_num_seqs=4, speculative_max_rows=2)
    prompts = [random_prompt(6, seed=i) * 4 for i in range(4)]
    drain(core, *(request(str(i), prompt, max_tokens=20) for i, prompt in enumerate(prompts)))
    assert core.stats().draft_tokens_total == 0


def test_sampled_tokens_keep_their_distribution(tiny):
    """Two hundred answers of three tokens: with drafts each is what its seed gives without."""
    prompt = random_prompt(12, seed=5)
    plain, core = make_core(tiny.folder), speculating(tiny.folder)
    core.scheduler.speculation._propose = lambda each, count: [7, 11][:count] if can_draft(each.sampling_params) else []
    params = {"max_tokens": 3, "temperature": 1.5}
    texts = {}
    for name, engine in (("plain", plain), ("drafted", core)):
        texts[name] = [tuple(answer(engine, prompt, seed=seed, **params).token_ids) for seed in range(200)]
    assert texts["plain"] == texts["drafted"]
    assert core.stats().draft_tokens_total > 0


@pytest.mark.parametrize("draft", [0, 1, 2])
def test_accepted_drafts_keep_any_distribution(draft):
    """Chi-square of the token after a draft that is right with its own probability."""
    probabilities = np.array([0.5, 0.3, 0.2])
    rng = np.random.default_rng(0)
    counts: Counter[int] = Counter()
    for _ in range(20_000):
        drawn = rng.choice(3, size=2, p=probabilities).tolist()
        kept = drawn[: num_kept([draft], drawn)]
        counts[kept[0]] += 1
    expected = 20_000 * probabilities
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(3))
    assert chi_square < 13.8, "p < 0.001 with two degrees of freedom"


def test_how_many_are_kept():
    assert num_kept([], [5]) == 1
    assert num_kept([5, 6], [5, 6, 7]) == 3
    assert num_kept([5, 9], [5, 6, 7]) == 2
    assert num_kept([1, 6], [5, 6, 7]) == 1
    assert num_kept([5, 6], [5, -1, 7]) == num_kept([5], [-1, 7]) == 1
    assert num_kept([5, 6], [5, 6, -1]) == 2


def test_bad_logits_after_a_right_draft_end_the_text_with_their_error(tiny):
    prompt = random_prompt(21, seed=1)
    plain = answer(make_core(tiny.folder, prefix_cache=False), prompt, max_tokens=20).token_ids
    core = speculating(tiny.folder, cuda_graphs=False, async_scheduling=False)
    knowing(core, [prompt], 0.0, max_tokens=20)
    sample = core.runner.served.kernels.sample

    def failing(logits, *draw):
        """Bad where the sixth token of the answer is drawn, in whatever step."""
        tokens = sample(logits, *draw)
        (each,) = core.scheduler.running
        place = 5 - each.num_output_tokens
        return (
            tokens.index_fill(0, torch.tensor([place], device=tokens.device), -1)
            if 0 <= place < len(tokens)
            else tokens
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.runner.sampler, "kernels", SimpleNamespace(sample=failing))
        failed = answer(core, prompt, max_tokens=20)
    assert (failed.token_ids, failed.finish_reason) == (plain[:5], "error") and failed.error


def test_drafts_end_before_the_answers_last_token_and_are_asked_of_seen_tokens():
    speculation = Speculation(7, 8)
    row = sequence([1, 2, 3] * 8, output=(1, 2, 3), num_computed_tokens=26, max_tokens=6)
    assert speculation.drafts(row) == [1, 2]
    assert not speculation.waits([row])
    row.output_token_ids.append(-1)
    assert speculation.waits([row])
