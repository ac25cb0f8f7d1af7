"""Drafts are what followed before, are right where a text repeats, and cost next to nothing where it does not."""

from __future__ import annotations

import itertools
import random

import pytest
from leyden.engine.scheduling import ngrams as drafts
from leyden.engine.scheduling.ngrams import NgramIndex, NgramProposer


def random_text(length: int, vocab: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]


def last_occurrence(text: list[int], min_n: int, max_n: int) -> int | None:
    """What `NgramIndex.find` is to find, by looking everywhere."""
    for n in range(max_n, min_n - 1, -1):
        for end in range(len(text) - 2, n - 2, -1):
            if n < len(text) and text[end - n + 1 : end + 1] == text[-n:]:
                return end
    return None


def common_prefix(first: list[int], second: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def simulate(text: list[int], prompt: int = 1, max_tokens: int = 15) -> list[tuple[int, int]]:
    """(drafted, accepted) of every step that writes the text down after its first `prompt` tokens."""
    proposer = NgramProposer(text[:prompt])
    steps, known = [], prompt
    while known < len(text):
        draft = proposer.propose(max_tokens)
        accepted = common_prefix(draft, text[known:-1])
        proposer.extend(text[known : known + accepted + 1])
        proposer.observe(len(draft), accepted)
        known += accepted + 1
        steps.append((len(draft), accepted))
    return steps


def wasted(steps: list[tuple[int, int]]) -> float:
    """The share of steps whose drafts were all wrong."""
    return sum(drafted > 0 and not accepted for drafted, accepted in steps) / len(steps)


@pytest.mark.parametrize(("min_n", "max_n"), [(2, 4), (1, 3), (3, 3)])
@pytest.mark.parametrize("vocab", [2, 5, 12])
def test_the_latest_of_the_longest_matches_is_found(vocab, min_n, max_n):
    num_equal = num_texts = 0
    for seed in range(30):
        text = random_text(60, vocab, seed)
        index = NgramIndex(min_n=min_n, max_n=max_n)
        for length, token in enumerate(text, 1):
            index.extend([token])
            found, expected = index.find(), last_occurrence(text[:length], min_n, max_n)
            num_texts, num_equal = num_texts + 1, num_equal + (found == expected)
            if found != expected:  # a newer n-gram has taken its place: a shorter match, or none, but never a wrong one
                assert expected is not None
                assert found is None or text[found - min_n + 1 : found + 1] == text[length - min_n : length]
    assert num_equal > 0.97 * num_texts


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_text_that_has_only_begun_has_no_drafts(length):
    assert NgramProposer([7] * length).propose(4) == []


def test_drafts_go_on_as_the_text_did():
    assert NgramProposer([1, 2, 3, 4, 5, 6, 1, 2]).propose(4) == [3, 4]
    assert NgramProposer([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]).propose(4) == [9, 2]  # three tokens match, not the later two
    assert NgramProposer([1, 2, 9, 1, 2, 8, 1, 2]).propose(4) == [8, 1]  # the later of two
    assert NgramProposer([5, 6, 7]).propose(4) == []


def test_where_the_text_ends_the_draft_goes_round():
    index = NgramIndex([3, 1, 2, 1, 2])
    assert index.continuation(index.find(), 5) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("most", [0, 1, 2])
def test_no_more_are_proposed_than_are_asked_for(most):
    assert len(NgramProposer([1, 2, 3] * 5).propose(most)) == most


def test_an_index_built_at_once_is_the_one_built_token_by_token(monkeypatch):
    text = random_text(3000, 40)
    monkeypatch.setattr(drafts, "FEW", len(text))
    slow = NgramIndex(text)
    slow.find()
    monkeypatch.setattr(drafts, "FEW", 0)
    at_once, in_pieces = NgramIndex(text), NgramIndex()
    for start in range(0, len(text), 70):
        in_pieces.extend(text[start : start + 70])
        in_pieces.find()
    at_once.find()
    assert slow._tables == at_once._tables == in_pieces._tables


def test_a_passage_is_found_again_in_a_long_text():
    text = random_text(50_000, 30_000)
    index = NgramIndex(text)
    right = 0
    for i, token in enumerate(text[1000:1200]):
        index.extend([token])
        found = index.find()
        right += found == 1000 + i
    assert right > 180


@pytest.mark.parametrize("length", [1_000, 100_000])
def test_memory_is_bounded(length):
    index = NgramIndex(random_text(length, 30_000))
    index.find()
    assert index.nbytes <= 52 * length + 4 * 3 * 256


@pytest.mark.parametrize(("vocab", "most"), [(5, 15), (10, 15), (100, 15), (30_000, 15), (5, 1), (100, 1)])
def test_a_text_that_does_not_repeat_wastes_few_steps(vocab, most):
    assert wasted(simulate(random_text(20_000, vocab), max_tokens=most)) <= 0.03


def test_drafts_that_are_always_wrong_are_seldom_tried():
    steps = simulate([*itertools.chain.from_iterable((1, 2, i) for i in range(3, 8000))])  # 1, 2 are followed anew
    assert wasted(steps) <= 0.03
    assert any(drafted for drafted, _ in steps[-200:]), "it still tries"


@pytest.mark.parametrize("period", [1, 3, 50, 400])
def test_a_text_that_repeats_is_written_in_few_steps(period):
    text = random_text(period, 30_000) * (4000 // period)
    steps = simulate(text, prompt=2 * period)
    assert len(steps) < len(text) / 7
    assert wasted(steps) <= 0.03


def test_drafts_grow_while_they_are_right():
    assert [drafted for drafted, _ in simulate([1, 2, 3] * 20, prompt=6)[:4]] == [2, 4, 7, 7]


def test_a_text_that_begins_to_repeat_is_noticed():
    noise, passage = random_text(5000, 10), random_text(200, 30_000, seed=1)
    steps = simulate(noise + passage * 20)
    ends = list(itertools.accumulate(accepted + 1 for _, accepted in steps))
    num_late = sum(end > len(noise) + len(passage) for end in ends)  # steps that write down what has been seen
    assert num_late < len(passage) * 19 / 7 + NgramProposer.MAX_PAUSE


def test_nothing_is_indexed_while_it_pauses(monkeypatch):
    proposer = NgramProposer([1, 2, 3, 1, 2])
    assert proposer.propose(2)
    proposer.extend([9])
    proposer.observe(2, 0)
    assert proposer.is_pausing
    monkeypatch.setattr(NgramIndex, "find", lambda _: pytest.fail("looked"))
    assert proposer.propose(2) == []


def test_pauses_double_and_a_right_draft_ends_them():
    proposer = NgramProposer([1, 2])
    pauses = []
    for _ in range(9):
        proposer.observe(2, 0)
        pause = 0
        while proposer.is_pausing:
            proposer.extend([0])
            pause += 1
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    proposer.observe(2, 2)
    assert not proposer.is_pausing
    proposer.observe(4, 0)
    proposer.extend([0])
    assert not proposer.is_pausing


def test_a_step_without_drafts_teaches_nothing():
    proposer = NgramProposer([1, 2, 3] * 3)
    proposer.observe(0, 0)
    assert len(proposer.propose(9)) == 2
