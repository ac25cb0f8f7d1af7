"""The rule of rings: what the host counts, and what the backends have room for."""

from __future__ import annotations

import pytest
from leyden.configs.schema import MAX_DRAFTS
from leyden.engine.memory.ring import RingRule
from leyden.kernels import load
from leyden.models.mixers.backends import LINEAR_BACKENDS


@pytest.mark.parametrize("capacity", [1, 4, 16])
def test_a_ring_that_replays_is_folded_before_it_is_full(capacity):
    rule, pending, seen = RingRule(capacity, replays=True), 0, []
    for _ in range(2 * capacity):
        pending = rule.after_decode[pending]
        seen.append(pending)
    assert seen == [*range(1, capacity), 0] * 2
    assert rule.after_decode[capacity] == 0, "a full ring, which a verify row may have left, is folded too"


def test_a_ring_for_drafts_alone_keeps_no_decoded_token():
    assert set(RingRule(16).after_decode) == {0}
    assert RingRule().after_decode == (0,)


def test_a_verify_row_leaves_one_place_free():
    rule = RingRule(16)
    assert rule.holds(7, 8) and not rule.holds(8, 8)
    assert rule.most_drafts == 14 and RingRule().most_drafts == 0
    assert rule.holds(0, 1 + rule.most_drafts) and not rule.holds(0, 2 + rule.most_drafts)


@pytest.mark.parametrize("kind", LINEAR_BACKENDS)
def test_every_backend_has_room_for_the_most_drafts_that_the_settings_allow(kind):
    for name, make in LINEAR_BACKENDS[kind].items():
        if name == "fla":  # it refuses drafts
            continue
        backend = make(load("torch"), speculative=True)
        assert RingRule(backend.ring_size, backend.replays).most_drafts >= MAX_DRAFTS
