"""Sampling: torch and Triton against a plain numpy rule, and one row never knows another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from leyden.kernels import load

IMPLEMENTATIONS = ["torch", "triton"]


def expected_token(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> set:
    """The token by the contract, in float64; near the border between two tokens, both."""
    x = logits.astype(np.float64)
    if temperature == 0:
        return {int(x.argmax())}
    e = np.exp((x - x.max()) / temperature)
    e[e < min_p] = 0
    if 0 < top_k < len(e):
        e[e < np.sort(e)[-top_k]] = 0
    if top_p < 1:
        order = np.sort(e)[::-1]
        before = np.cumsum(order) - order
        e[e < order[before < top_p * order.sum()].min()] = 0
    sums = np.cumsum(e)
    return {int(np.searchsorted(sums, point * sums[-1], side="right")) for point in (u - 1e-5, u, u + 1e-5)}


def random_rows(num_rows: int, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    choose = lambda values: torch.tensor(rng.choice(values, num_rows))  # noqa: E731
    return {
        "temperature": choose([0.0, 0.5, 1.0, 3.0]).float(),
        "top_k": choose([0, 1, 3, 20, 1000]).int(),
        "top_p": choose([1.0, 0.95, 0.5, 0.01]).float(),
        "min_p": choose([0.0, 0.0, 0.05]).float(),
        "uniform": torch.tensor(rng.random(num_rows)).float(),
    }


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 50, 9001])
def test_tokens_are_those_of_the_rule(name, dtype, vocab, device):
    num_rows = 12
    logits = (torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(dtype)
    rows = random_rows(num_rows, vocab)
    tokens = load(name).sample(logits.to(device), **{key: value.to(device) for key, value in rows.items()})
    assert tokens.dtype == torch.int32
    for i, token in enumerate(tokens.tolist()):
        row = [rows[key][i].item() for key in ("temperature", "top_k", "top_p", "min_p", "uniform")]
        assert token in expected_token(logits[i].float().numpy(), *row), (i, row)


def one(name, logits, device, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5) -> int:
    values = [torch.tensor([value], dtype=torch.float32, device=device) for value in (top_p, min_p, uniform)]
    k = torch.tensor([top_k], dtype=torch.int32, device=device)
    t = torch.tensor([temperature], dtype=torch.float32, device=device)
    return int(load(name).sample(torch.tensor([logits], device=device), t, k, *values))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_give_minus_one(name, temperature, bad, device):
    assert one(name, [0.0, bad, 1.0], device, temperature=temperature, top_p=0.9, top_k=2) == -1


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_minus_infinity_is_never_drawn_and_alone_is_no_distribution(name, device):
    hidden = [-math.inf, 2.0, -math.inf, 1.0, -math.inf]
    drawn = {
        one(name, hidden, device, top_k=k, top_p=p, uniform=u) for k in (0, 4) for p in (0.99, 1) for u in (0, 0.999)
    }
    assert drawn == {1, 3}
    assert one(name, [-math.inf] * 3, device) == one(name, [-math.inf] * 3, device, temperature=0.0) == -1


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_extremes_of_the_filters_keep_the_best(name, device):
    logits = [0.0, 3.0, 2.9999, -1e30, 1e-20]
    for only in ({"top_k": 1}, {"top_p": 1e-30}, {"min_p": 1.0}, {"temperature": 1e-6}, {"top_p": 0.3, "top_k": 2}):
        assert {one(name, logits, device, uniform=u, **only) for u in (0.0, 0.5, 0.9999999)} == {1}, only


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equal_tokens_are_kept_together_and_greedy_takes_the_first(name, device):
    logits = [1.0, 4.0, 4.0, 4.0, 0.0]
    assert {one(name, logits, device, top_k=1, uniform=u) for u in (0.1, 0.5, 0.9)} == {1, 2, 3}
    assert {one(name, logits, device, top_p=0.01, uniform=u) for u in (0.1, 0.5, 0.9)} == {1, 2, 3}
    assert one(name, logits, device, temperature=0.0) == 1


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_rows_are_read_where_they_lie(name, device):
    wide = torch.randn(6, 2, 90, generator=torch.Generator().manual_seed(4)).to(device)
    rows = {key: value.to(device) for key, value in random_rows(6, 4).items()}
    sample = load(name).sample
    assert torch.equal(sample(wide[:, 1], **rows), sample(wide[:, 1].contiguous(), **rows))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_rows(name, device):
    empty = torch.empty(0, device=device)
    assert load(name).sample(torch.empty(0, 7, device=device), empty, empty.int(), empty, empty, empty).shape == (0,)
