"""The OpenAPI document is truthful: what it promises of every route holds for requests that somebody else makes up."""

from __future__ import annotations

import pytest
import schemathesis
import schemathesis.specs.openapi.schemas  # now: parsed later, deep within a test, it may fail (a fault of CPython)
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

EXAMPLES = 60  # per route and mode
# `positive_data_acceptance` is not among them: no schema can tell that a prompt fits the context.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
GENERATE = ["/v1/completions", "/v1/chat/completions", "/v1/responses"]
TAKE_A_BODY = [*GENERATE, "/tokenize", "/detokenize"]
ROUTERS = ["/load", "/server_info", "/get_model_info"]
SESSIONS = ["/v1/sessions", "/v1/sessions/{session_id}"]
SESSIONS += [f"/v1/sessions/{{session_id}}/{action}" for action in ("save", "restore", "delete")]
OTHERS = [*SESSIONS, "/v1/models", "/v1/models/{model_id}", "/health", "/version", "/metrics", *ROUTERS]
SOUND, UNSOUND = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.fixture
def document(make_app):
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(allowed_hosts=["testserver"]))


def test_every_field_of_a_body_is_described(document):
    bodies = [document[path]["POST"].definition.raw["requestBody"]["content"] for path in TAKE_A_BODY]
    for body in bodies:
        fields = body["application/json"]["schema"]["properties"]
        assert [name for name, field in fields.items() if not field.get("description")] == []


def test_every_route_is_tried(document):
    assert {route.ok().path for route in document.get_all_operations()} == {*TAKE_A_BODY, *OTHERS}


CASES = {
    **{f"{path}, sound": (path, SOUND, {}) for path in TAKE_A_BODY + OTHERS},
    **{f"{path}, unsound": (path, UNSOUND, {}) for path in TAKE_A_BODY},
    **{f"{path}, sound, streamed": (path, SOUND, {"stream": True}) for path in GENERATE},
}


@pytest.mark.parametrize(("path", "mode", "fields"), CASES.values(), ids=CASES)
def test_answers_follow_the_document(document, path, mode, fields):
    (route,) = [found.ok() for found in document.include(path=path).get_all_operations()]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=route.as_strategy(generation_mode=mode))
    def keeps_its_promise(case):
        if fields:
            case.body = case.body | fields
        case.call_and_validate(checks=CHECKS)

    keeps_its_promise()
