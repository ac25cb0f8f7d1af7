"""Sampling against plain numpy formulas: exact support, right frequencies, and a row that knows no neighbours."""

from __future__ import annotations

import math
import random
from array import array
from typing import NamedTuple

import numpy as np
import pytest
import torch
from engines import sequence
from leyden.engine.execution.sampler import Sampler, SamplingBatch, token_logprobs
from leyden.engine.execution.sampling_rows import SamplingRows, SlotFacts, uniform
from leyden.engine.outputs import TokenLogprobs
from leyden.engine.sequence import UNSEEN, Sequence
from leyden.kernels import load

VOCAB = 12
NUM_DRAWS = 4_000
CPU = torch.device("cpu")
LOGITS = torch.tensor([1.0, -2.0, 0.5, 2.5, -1.0, 0.0, 1.5, -0.5, 2.0, -3.0, 0.25, 0.75])


class Drawn(NamedTuple):
    token_ids: torch.Tensor
    is_valid: torch.Tensor
    logprobs: list[TokenLogprobs | None]


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> Drawn:
    """One step of a new sampler that has these sequences in its slots."""
    for slot, each in enumerate(sequences):
        each.state_slot, each.block_table = slot, array("i")
    return step(Sampler(load("torch"), len(sequences), logits.shape[1], CPU), SlotFacts(), logits, sequences)


def step(sampler: Sampler, facts: SlotFacts, logits: torch.Tensor, sequences: list[Sequence]) -> Drawn:
    rows = SamplingRows(sequences, [each.state_slot for each in sequences], facts)
    arrays = rows.arrays(logits.shape[1], [each.num_output_tokens for each in sequences])
    batch = SamplingBatch.of({name: torch.from_numpy(array) for name, array in arrays.items()}, rows.num_top)
    tokens, logprobs = sampler.sample(logits, batch).wait()
    token_ids = torch.tensor(tokens)
    return Drawn(token_ids, token_ids >= 0, logprobs)


def reference(logits: np.ndarray, *, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0) -> np.ndarray:
    """Probabilities after temperature, then min-p, then top-k, then top-p over what is left."""
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if 0 < top_k < len(p):
        p[order[top_k:]] = 0
    p /= p.sum()
    mass = 0.0
    for i in order:  # keep the smallest set whose mass reaches top_p
        if mass >= top_p:
            p[i] = 0
        mass += p[i]
    return p / p.sum()


def draw_many(logits: torch.Tensor, **params) -> np.ndarray:
    """How often each token comes, over NUM_DRAWS rows that differ only in their seed."""
    rows = [sequence([0], seed=seed, **params) for seed in range(NUM_DRAWS)]
    ids = sample(logits.expand(NUM_DRAWS, -1), rows).token_ids
    return np.bincount(ids.numpy(), minlength=len(logits))


FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_k 1": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 99},
    "top_k -1 is off": {"top_k": -1},
    "top_p": {"top_p": 0.7},
    "small top_p keeps the best": {"top_p": 0.01},
    "tiny top_p keeps the best": {"top_p": 1e-30},
    "min_p": {"min_p": 0.2},
    "min_p 1 keeps the best": {"min_p": 1.0},
    "top_k then top_p": {"top_k": 5, "top_p": 0.8},
    "everything": {"temperature": 1.7, "top_k": 8, "top_p": 0.9, "min_p": 0.1},
}


@pytest.mark.parametrize("params", FILTERS.values(), ids=FILTERS.keys())
def test_draws_follow_the_filtered_distribution(params):
    expected = reference(LOGITS.numpy(), **(params | {"top_k": max(params.get("top_k", 0), 0)}))
    counts = draw_many(LOGITS, **params)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected)), "a token outside the support was drawn"
    kept = expected > 0
    chi_square = (((counts - NUM_DRAWS * expected) ** 2)[kept] / (NUM_DRAWS * expected[kept])).sum()
    assert chi_square < 40, f"chi-square {chi_square:.1f} with at most 11 degrees of freedom"


def test_support_is_exact_for_random_filters():
    rng = random.Random(3)
    for trial in range(12):
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(trial))
        params = {
            "temperature": rng.choice([0.5, 1.0, 4.0]),
            "top_k": rng.choice([0, 2, 5, 11]),
            "top_p": rng.choice([0.3, 0.77, 0.95, 1.0]),
            "min_p": rng.choice([0.0, 0.05, 0.3]),
        }
        expected = reference(logits.numpy(), **params)
        rows = [sequence([0], seed=seed, **params) for seed in range(1500)]
        drawn = set(sample(logits.expand(1500, -1), rows).token_ids.tolist())
        assert drawn <= set(np.flatnonzero(expected)), params
        assert drawn >= set(np.flatnonzero(expected > 0.02)), params


def test_temperature_zero_is_greedy_and_ties_go_to_the_first():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 1.0, 1.0]])
    rows = [sequence([0], seed=seed, temperature=0.0, top_p=0.5) for seed in range(2)]
    assert sample(logits, rows).token_ids.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-39, 1e-300])
def test_temperature_near_zero_is_greedy_too(temperature):
    rows = [sequence([0], seed=seed, temperature=temperature) for seed in range(50)]
    sampled = sample(LOGITS.expand(50, -1), rows)
    assert set(sampled.token_ids.tolist()) == {3} and sampled.is_valid.all()


class CountedBias(dict):
    """A `logit_bias` that counts how often its entries are gone through."""

    def __init__(self, *entries) -> None:
        super().__init__(*entries)
        self.count = 0

    def __iter__(self):
        self.count += 1
        return super().__iter__()

    def values(self):
        self.count += 1
        return super().values()

    def items(self):
        self.count += 1
        return super().items()


def test_a_bias_is_gone_through_once_and_not_in_every_step():
    biases = [CountedBias({7: 1.0, 2: -1.0}), CountedBias({7: 2.0})]
    first, second = (sequence([1], logit_bias=bias, min_tokens=2, stop_token_ids=[4]) for bias in biases)
    first.state_slot, second.state_slot = 0, 1
    own, facts = {7: 1.0, 2: -1.0}, SlotFacts()
    for step_number in range(4):  # rows that come and go are gathered anew, too
        for rows in ([first], [first, second], [second, first]):
            gathered = SamplingRows(rows, [each.state_slot for each in rows], facts)
            arrays = gathered.arrays(VOCAB, [step_number] * len(rows))
            found = dict(zip(arrays["bias_at"].tolist(), arrays["bias"].tolist(), strict=True))
            stops = {4: -math.inf} if step_number < 2 else {}
            at = {row: (own if each is first else {7: 2.0}) | stops for row, each in enumerate(rows)}
            assert found == {row * VOCAB + t: value for row, one in at.items() for t, value in one.items()}
        for each in (first, second):
            each.output_token_ids.append(5)
        if step_number == 0:
            made = [bias.count for bias in biases]
    assert made == [bias.count for bias in biases]


def test_bias_penalties_and_min_tokens_follow_their_formulas():
    rng = random.Random(0)
    for trial in range(200):
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(trial)) * 2
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        output = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(0, 6)))
        bias = {rng.randrange(VOCAB): rng.uniform(-4, 4) for _ in range(rng.randint(0, 3))}
        repetition, presence, frequency = rng.uniform(0.5, 2), rng.uniform(-2, 2), rng.uniform(-2, 2)
        min_tokens = rng.choice([0, 3])
        stops, eos = (rng.randrange(VOCAB),), frozenset({rng.randrange(VOCAB)})
        ignore_eos = rng.random() < 0.5
        want = logits.double().numpy().copy()
        for token, value in bias.items():
            want[token] += value
        if len(output) < min_tokens:
            want[list(stops)] = -np.inf
            if not ignore_eos:
                want[list(eos)] = -np.inf
        for token in {*prompt, *output}:
            want[token] = want[token] / repetition if want[token] > 0 else want[token] * repetition
        for token in set(output):
            want[token] -= presence + frequency * output.count(token)
        got = sample(
            logits[None],
            [
                sequence(
                    prompt,
                    output=output,
                    temperature=0.0,
                    logit_bias=bias or None,
                    repetition_penalty=repetition,
                    presence_penalty=presence,
                    frequency_penalty=frequency,
                    min_tokens=min_tokens,
                    stop_token_ids=stops,
                    ignore_eos=ignore_eos,
                    eos_token_ids=eos,
                )
            ],
        ).token_ids[0]
        assert int(got) == int(want.argmax()), trial


def test_presence_and_frequency_do_not_look_at_the_prompt_and_repetition_does():
    logits = torch.zeros(4)
    logits[2] = 1.0
    row = sequence([2, 2], temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert int(sample(logits[None], [row]).token_ids[0]) == 2
    logits[1] = 0.9
    row = sequence([2], temperature=0.0, repetition_penalty=2.0)
    assert int(sample(logits[None], [row]).token_ids[0]) == 1


def test_token_of_minus_infinity_is_never_drawn():
    logits = torch.full((6,), -math.inf)
    logits[[1, 4]] = 0.0
    rows = [sequence([0], seed=seed) for seed in range(500)]
    assert set(sample(logits.expand(500, -1), rows).token_ids.tolist()) == {1, 4}


def random_row(i: int):
    rng = random.Random(i)
    return sequence(
        [rng.randrange(64) for _ in range(3)],
        seed=i,
        output=tuple(rng.randrange(64) for _ in range(rng.randint(0, 4))),
        temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
        top_k=rng.choice([0, 5, 20]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        min_p=rng.choice([0.0, 0.05]),
        presence_penalty=rng.choice([0.0, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        logprobs=rng.choice([None, 0, 5]),
    )


def test_token_and_logprobs_are_the_same_whatever_rows_are_beside_and_in_whatever_order():
    rows = [random_row(i) for i in range(40)]
    logits = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)) * 3
    alone = [sample(logits[i : i + 1], [row]) for i, row in enumerate(rows)]
    for seed in range(5):
        order = random.Random(seed).sample(range(40), 40 - 7 * seed)
        together = sample(logits[order], [rows[i] for i in order])
        assert together.token_ids.tolist() == [int(alone[i].token_ids[0]) for i in order]
        assert together.logprobs == [alone[i].logprobs[0] for i in order]


def test_each_position_of_an_answer_draws_anew():
    rows = [sequence([0], seed=7, output=(1,) * n) for n in range(200)]
    drawn = sample(LOGITS.expand(200, -1), rows).token_ids
    assert len(set(drawn.tolist())) > 6
    assert torch.equal(drawn, sample(LOGITS.expand(200, -1), rows).token_ids)


def test_logits_are_not_changed():
    logits = torch.randn(3, 64)
    before = logits.clone()
    sample(logits, [sequence([1, 2], output=(3,), repetition_penalty=2.0, logit_bias={1: 5.0}, logprobs=3)] * 3)
    assert torch.equal(logits, before)


def test_logprobs_are_one_log_softmax_of_the_raw_logits_with_the_chosen_token_exactly_once():
    logits = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)) * 4
    rows = [sequence([0], seed=i, temperature=2.0, logprobs=i % 6, logit_bias={7: 30.0 * (i % 2)}) for i in range(20)]
    sampled = sample(logits, rows)
    table = logits.log_softmax(-1)
    for i, entry in enumerate(sampled.logprobs):
        token, wanted = int(sampled.token_ids[i]), i % 6
        best = table[i].topk(max(wanted, 1)).indices.tolist()[:wanted]
        assert entry.token_id == token and entry.logprob == table[i, token].item()
        ids = [t for t, _ in entry.top]
        assert ids == best + ([token] if token not in best else [])
        assert [value for _, value in entry.top] == [table[i, t].item() for t in ids]


def test_rows_that_ask_for_no_logprobs_get_none():
    sampled = sample(torch.randn(3, 8), [sequence([0], logprobs=n) for n in (None, 0, 2)])
    assert [entry is None for entry in sampled.logprobs] == [True, False, False]


def test_more_alternatives_than_tokens_gives_them_all():
    [entry] = token_logprobs(torch.randn(1, 5), torch.tensor([3]), [20])
    assert sorted(token for token, _ in entry.top) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_flagged_for_their_row_alone(bad, temperature):
    logits = torch.randn(5, 16)
    logits[2, 7] = bad
    rows = [sequence([0], seed=i, temperature=temperature, top_p=0.9, top_k=5, logprobs=2) for i in range(5)]
    sampled = sample(logits, rows)
    assert sampled.is_valid.tolist() == [True, True, False, True, True]
    assert (sampled.token_ids < 16).all()


def test_row_of_minus_infinity_alone_is_flagged():
    assert sample(torch.full((1, 4), -math.inf), [sequence([0])]).is_valid.tolist() == [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_float32(dtype):
    logits = (LOGITS * 3).to(dtype)
    sampled = sample(logits[None], [sequence([0], temperature=0.0, logprobs=1)])
    assert sampled.logprobs[0].logprob == logits.float().log_softmax(-1).max().item()


def test_penalties_count_tokens_that_the_host_has_not_seen():
    """Three steps of which no token is known when the next is asked for, then a new owner of the slot."""
    logits = torch.tensor([[3.0, 2.5, 2.0, 0.0]])
    params = {"temperature": 0.0, "presence_penalty": 1.2, "max_tokens": 99}
    row = sequence([3], state_slot=1, **params)
    sampler, facts = Sampler(load("torch"), 2, 4, CPU), SlotFacts()
    drawn = []
    for _ in range(4):
        drawn.append(int(step(sampler, facts, logits, [row]).token_ids[0]))
        row.output_token_ids.append(UNSEEN)
    assert drawn == [0, 1, 2, 0]
    assert sampler.counts[1].tolist() == [4, 2, 2, 1] and not sampler.counts[0].any()
    assert sampler.last_tokens[:2].tolist() == [0, 0]
    assert int(step(sampler, facts, logits, [sequence([2], state_slot=1, **params)]).token_ids[0]) == 0
    assert sampler.counts[1].tolist() == [2, 0, 1, 0]


def numbers_of(seeds: list[int], positions: list[int]) -> np.ndarray:
    return uniform(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64), np.array(positions))


def test_uniform_is_uniform_over_positions_and_over_seeds():
    for numbers in (
        numbers_of([5] * 20_000, list(range(20_000))),
        numbers_of(list(range(20_000)), [0] * 20_000),
        numbers_of([(3 << 32) + seed for seed in range(20_000)], [7] * 20_000),
        numbers_of([-seed for seed in range(20_000)], [1] * 20_000),
    ):
        assert numbers.min() >= 0 and numbers.max() < 1
        counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 110  # 49 degrees of freedom
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
        assert len(set(numbers)) == len(numbers)


def test_uniform_depends_on_nothing_but_seed_and_position():
    assert numbers_of([9, 1, 3], [0, 2, 5])[1] == numbers_of([1], [2])[0]
    seeds, positions = zip(*[(seed, position) for seed in range(-3, 3) for position in range(10)], strict=True)
    assert len(set(numbers_of(list(seeds), list(positions)))) == 60
    extremes = numbers_of([-(2**63), 2**63 - 1, 2**32, 2**80], [0] * 4)
    assert ((extremes >= 0) & (extremes < 1)).all()
