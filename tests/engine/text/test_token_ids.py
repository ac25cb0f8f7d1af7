"""A prompt's ids: a list that is small and quick to send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leyden.engine.errors import RequestError
from leyden.engine.messages import AddRequest, engine_decoder, to_engine
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.text.token_ids import TokenIds

IDS = st.lists(st.integers(-5, 2**31 - 1), max_size=20)


@given(ids=IDS, other=IDS, start=st.integers(-3, 21), end=st.integers(-3, 21))
def test_ids_are_like_a_list_of_them(ids, other, start, end):
    mine = TokenIds(ids)
    assert (mine.tolist(), list(mine), len(mine), bool(mine)) == (ids, ids, len(ids), bool(ids))
    assert mine == ids and mine == TokenIds(ids) and (mine == other) == (ids == other)
    assert mine[start:end] == ids[start:end]
    assert not ids or mine[-1] == ids[-1]


@given(ids=IDS, size=st.integers(1, 2**31 - 1))
def test_the_first_id_outside_a_vocabulary_is_found(ids, size):
    assert TokenIds(ids).first_outside(size) == next((i for i in ids if not 0 <= i < size), None)


@given(ids=IDS)
def test_a_request_reaches_the_engine_as_it_was_sent_with_four_bytes_for_each_id(ids):
    def message(ids):
        return AddRequest(request_id="r", prompt_token_ids=ids, sampling_params=SamplingParams())

    assert engine_decoder().decode(to_engine(message(ids))) == message(ids)
    assert len(to_engine(message(ids * 1000))) < 4000 * len(ids) + 1000


@pytest.mark.parametrize("ids", [[2**31], [1, -(2**40)]])
def test_an_id_of_no_vocabulary_is_a_request_error(ids):
    with pytest.raises(RequestError, match="prompt"):
        TokenIds(ids)


@pytest.mark.parametrize("ids", [[1.5], ["1"], [None]])
def test_value_that_is_no_id_is_a_type_error(ids):
    with pytest.raises(TypeError):
        TokenIds(ids)
