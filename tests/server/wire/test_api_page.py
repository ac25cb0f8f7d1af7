"""docs/api.md says what the tables of the server say: a page written by hand is no table's own oracle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from leyden.configs.schema import ServerConfig
from leyden.server.errors import ERROR_TYPES, SESSION_STATUS, ApiError
from leyden.server.parsers.formats import TOOL_FORMATS
from leyden.server.responses_api.request import ResponsesRequest
from leyden.server.wire.requests import ChatRequest, CompletionRequest
from prometheus_client.parser import text_string_to_metric_families

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def names_in(text):
    return set(re.findall(r"`(\w+)", text))


ERRORS = [row.split(" | ") for row in re.findall(r"^\| (\d{3} \| .*) \|$", section("Errors"), re.MULTILINE)]


def test_every_status_has_the_type_that_the_page_says():
    told = {int(status): kind.strip("`") for status, kind, *_ in ERRORS}
    assert told == ERROR_TYPES
    assert {status: ApiError(status, "x").type for status in told} == told


def test_every_code_of_a_session_has_the_status_that_the_page_says():
    told = {code: int(status) for status, _, codes, *_ in ERRORS for code in names_in(codes)}
    assert {code: told.get(code) for code in SESSION_STATUS} == SESSION_STATUS


async def test_page_and_server_name_the_same_metrics(client):
    await client.post("/v1/completions", json={"prompt": "Hi"})
    text = (await client.get("/metrics")).text
    told = names_in(section("Metrics").replace("`metrics_prefix`", "").replace("`model_name`", ""))
    found = set()
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix("leyden:")
        if not name.endswith("_created"):  # the client library's own
            found.add(f"{name}_total" if family.type == "counter" else name)
    assert found - told == set(), "not on the page"
    kinds = {"leyden", "vllm", "device", "host", "weights", "state", "kv", "snapshots", "sampler", "workspace"}
    assert told - found - kinds - {"graphs", "other", "free"} == set(), "not there"


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest, ResponsesRequest])
def test_every_field_of_a_request_is_on_the_page(model):
    assert set(model.model_fields) - names_in(PAGE) == set()


def test_page_and_setting_name_the_same_parsers():
    told = set(re.findall(r"^\| `(\w+)` \| .* \|$", section("Tools"), re.MULTILINE))
    assert told == set(TOOL_FORMATS)
    setting = ServerConfig.model_fields["tool_call_parser"].annotation
    assert set(get_args(setting)) == told | {"auto", "none"}
