"""The rungs of a prompt: near enough to each other for what the documents promise, and few."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from leyden.engine.prefix.ladder import MAX_LEVEL, Ladder


@pytest.mark.parametrize(("min_tokens", "interval"), [(128, 4096), (128, 1 << 20), (1, 1000), (5, 3), (128, 100)])
def test_of_any_beginning_three_quarters_or_all_but_the_interval_lie_before_a_rung(min_tokens, interval):
    rungs = [at for at, _ in Ladder(min_tokens, interval).between(0, 40_000)]
    assert rungs == sorted(set(rungs))
    for shared in range(4 * min_tokens, 40_000):
        kept = max((at for at in rungs if at <= shared), default=0)
        assert kept >= 3 / 4 * shared or shared - kept < interval
        if shared > 10_000:
            break
    for before, after in itertools.pairwise(rungs):
        assert after - before >= min(min_tokens, interval), "nearer to each other than a snapshot is worth"
    geometric = max(0.0, math.log(min(40_000, 3 * interval) / (3 * min_tokens), 4 / 3)) if interval > min_tokens else 0
    assert len(rungs) <= geometric + 40_000 / interval + 4


def test_the_rungs_of_the_default_settings():
    ladder = Ladder(128, 4096)
    assert [at for at, _ in ladder.between(0, 12_000)][:8] == [384, 512, 682, 909, 1212, 1616, 2154, 2872]
    assert len(ladder.between(0, 8192)) == 11 and len(ladder.between(0, 131_072)) == 42


@pytest.mark.parametrize(("min_tokens", "interval"), [(128, 4096), (128, 1000), (1, 1000), (5, 3), (200, 4096)])
def test_rungs_lie_where_the_models_layers_can_save_their_states(min_tokens, interval):
    rungs = [at for at, _ in Ladder(min_tokens, interval, every=64).between(0, 40_000)]
    assert rungs == sorted(set(rungs)) and all(at % 64 == 0 for at in rungs)
    for shared in range(max(4 * min_tokens, 256), 10_000):
        kept = max((at for at in rungs if at <= shared), default=0)
        assert kept >= 3 / 4 * shared - 64 or shared - kept < max(interval, 64)
    assert [at for at, _ in Ladder(128, 4096, every=64).between(0, 1500)] == [384, 512, 640, 832, 1088, 1408]


def test_parts_make_the_whole_in_any_order():
    rng = random.Random(0)
    whole = Ladder(7, 90).between(0, 5000)
    for _ in range(20):
        cuts = [0, *sorted(rng.sample(range(1, 5000), 9)), 5000]
        ladder = Ladder(7, 90)
        parts = {part: ladder.between(*part) for part in rng.sample(list(itertools.pairwise(cuts)), len(cuts) - 1)}
        assert [rung for part in sorted(parts) for rung in parts[part]] == whole


def test_every_other_rung_that_is_left_has_the_next_level():
    levels = [level for _, level in Ladder(1, 3).between(0, 300)]
    for level in range(MAX_LEVEL):
        places = [i for i, found in enumerate(levels) if found >= level]
        assert [levels[i] == level for i in places] == [n % 2 == 0 for n in range(len(places))]
    assert max(levels) == MAX_LEVEL


def test_an_interval_of_nothing_leaves_nothing():
    assert Ladder(128, 0).between(0, 1 << 20) == []
