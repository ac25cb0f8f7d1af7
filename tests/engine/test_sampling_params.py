"""What Python code may pass: the same bounds as over HTTP, and a `RequestError` that names the field."""

from __future__ import annotations

import math

import msgspec
import pytest
from leyden.configs.schema import ServerConfig
from leyden.engine import sampling_params
from leyden.engine.errors import RequestError
from leyden.engine.sampling_params import SamplingParams

WRONG = [
    ("temperature", "x"),
    ("temperature", None),
    ("temperature", True),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 10**400),
    ("top_p", [1]),
    ("top_k", 1.5),
    ("top_k", 2**63),
    ("min_p", "0"),
    ("repetition_penalty", 0),
    ("presence_penalty", {}),
    ("frequency_penalty", 2**63),
    ("max_tokens", "5"),
    ("max_tokens", 2**63),
    ("min_tokens", None),
    ("seed", 1.0),
    ("seed", 2**63),
    ("logprobs", True),
    ("prompt_logprobs", 21),
    ("stop", ""),
    ("n", 0),
    ("stop", [1]),
    ("stop", [""]),
    ("stop", None),
    ("stop_token_ids", 5),
    ("stop_token_ids", (1.0,)),
    ("logit_bias", [1]),
    ("logit_bias", {"5": 1}),
    ("logit_bias", {5: "1"}),
    ("logit_bias", {5: math.nan}),
    ("ignore_eos", 1),
    ("skip_special_tokens", "yes"),
    ("include_stop_str_in_output", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value)[:30])
def test_a_wrong_value_is_a_request_error_that_names_its_field(name, value):
    with pytest.raises(RequestError, match=name) as error:
        SamplingParams(**{name: value})
    assert error.value.param == name
    assert len(str(error.value)) < 250


def test_numbers_and_lists_of_every_sound_kind_are_taken():
    params = SamplingParams(temperature=1, top_p=1, stop=["a"], stop_token_ids=[3], logit_bias={3: 1}, max_tokens=None)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams).logit_bias == {3: 1.0}


@pytest.mark.parametrize(
    ("setting", "bound"),
    [
        ("max_stop_strings", sampling_params.MAX_STOP_STRINGS),
        ("max_stop_chars", sampling_params.MAX_STOP_CHARS),
        ("max_logprobs", sampling_params.MAX_LOGPROBS),
        ("max_logit_bias", sampling_params.MAX_LOGIT_BIAS),
    ],
)
def test_the_settings_bounds_are_the_engines(setting, bound):
    field = ServerConfig.model_fields[setting]
    assert field.default == bound
    assert [limit.le for limit in field.metadata if hasattr(limit, "le")] == [bound]
