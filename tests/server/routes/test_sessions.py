"""The routes of sessions, over an engine that is told what to answer."""

from __future__ import annotations

import pytest
from leyden.engine.errors import SessionError
from leyden.engine.messages import SessionDone, SessionFile
from leyden.server.errors import SESSION_STATUS

ACTIONS = {
    "save": ("POST", "/v1/sessions/a-1_B/save"),
    "restore": ("POST", "/v1/sessions/a-1_B/restore"),
    "delete": ("DELETE", "/v1/sessions/a-1_B"),
    "list": ("GET", "/v1/sessions"),
}


@pytest.mark.parametrize("action", ["save", "restore"])
async def test_a_session_is_saved_and_restored_by_its_id(client, engine, action):
    response = await client.request(*ACTIONS[action])
    assert response.status_code == 200
    assert response.json() == {"id": "a-1_B", "object": "session", "tokens": 7, "bytes": 100, "seconds": 0.5}
    assert engine.calls == [(action, "a-1_B")]


@pytest.mark.parametrize(("method", "path"), [ACTIONS["delete"], ("POST", "/v1/sessions/a-1_B/delete")])
async def test_a_session_is_deleted(client, engine, method, path):
    response = await client.request(method, path)
    assert response.json() == {"id": "a-1_B", "object": "session", "deleted": True}
    assert engine.calls == [("delete", "a-1_B")]


async def test_sessions_are_listed(client, engine):
    engine.session_done = SessionDone(call_id="1", files=[SessionFile("a", 5, 6), SessionFile("b", 7, 3)], is_cut=True)
    assert (await client.get("/v1/sessions")).json() == {
        "object": "list",
        "data": [
            {"id": "a", "object": "session", "bytes": 5, "modified": 6},
            {"id": "b", "object": "session", "bytes": 7, "modified": 3},
        ],
        "has_more": True,
    }


@pytest.mark.parametrize(("code", "status"), SESSION_STATUS.items())
@pytest.mark.parametrize("action", ACTIONS)
async def test_every_error_has_its_status(client, engine, error_of, action, code, status):
    engine.session_error = SessionError("what is wrong", code)
    response = await client.request(*ACTIONS[action])
    error = error_of(response, status)
    assert (error["message"], error["code"]) == ("what is wrong", code)
    assert error["param"] == ("session_id" if code == "session_id_invalid" else None)
    assert ("retry-after" in response.headers) == (status == 429)


@pytest.mark.parametrize("action", ACTIONS)
async def test_no_session_is_touched_while_draining_or_dead(make_app, make_client, engine, error_of, action):
    app = make_app()
    client = make_client(app)
    app.state.draining = True
    error_of(await client.request(*ACTIONS[action]), 503)
    app.state.draining = False
    engine.is_healthy = False
    error_of(await client.request(*ACTIONS[action]), 503)
    assert engine.calls == []


@pytest.mark.parametrize("action", ["save", "restore", "delete"])
async def test_the_fields_of_a_body_are_named_as_ignored(client, engine, error_of, action):
    response = await client.request(*ACTIONS[action], json={"x": 1, "session_id": "b", "y": None})
    assert (response.status_code, response.headers["x-ignored-parameters"]) == (200, "x, session_id")
    assert engine.calls == [(action, "a-1_B")]
    assert "x-ignored-parameters" not in (await client.request(*ACTIONS[action], json={})).headers
    error_of(await client.request(*ACTIONS[action], content=b"x=1"), 415)
    error_of(await client.request(*ACTIONS[action], json=[1]), 400)
    assert len(engine.calls) == 2


@pytest.mark.parametrize(
    "path", ["/v1/sessions/", "/v1/sessions/a/b/save", "/v1/sessions//save", "/v1/sessions/a/load"]
)
async def test_an_id_is_one_part_of_the_path(client, engine, path):
    assert (await client.post(path)).status_code in (404, 405)
    assert engine.calls == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
    ],
)
async def test_a_request_names_its_session(client, engine, error_of, path, body):
    for session_id in ("a-1_B", None):
        assert (await client.post(path, json=body | {"session_id": session_id})).status_code == 200
    assert [request.session_id for request in engine.requests] == ["a-1_B", None]
    for wrong in ("", "../a", "a" * 65, "a\n", 5):
        error = error_of(await client.post(path, json=body | {"session_id": wrong}), 400)
        assert error["param"] == "session_id"


@pytest.mark.parametrize("fields", [{"n": 2}, {"prompt": ["a", "b"]}])
async def test_a_session_is_one_conversation(complete, engine, error_of, fields):
    error = error_of(await complete(session_id="a", **fields), 400)
    assert error["param"] == "session_id" and "n = 1" in error["message"]
    engine.info.has_sessions = False
    assert (await complete(session_id="a", **fields)).status_code == 200, "then it only says who asks"
    assert {request.session_id for request in engine.requests} == {None}
