"""Saved conversations: GET /v1/sessions, POST /v1/sessions/{id}/save and /restore, DELETE /v1/sessions/{id}.

The files are the engine's; this process opens none of them.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ...engine.messages import SessionAction, SessionDone
from ..door.validation import read_body
from ..state import ReadyState, ServerState
from ..wire.answers import json_response
from ..wire.document import WITH_BODY, documented
from . import reading

router = APIRouter()

DELETING = (*WITH_BODY, 404, 409, 429)
MOVING = (*DELETING, 507)


class SessionState(msgspec.Struct):
    """What was saved or restored, and how long that took in the engine."""

    id: str
    object: Literal["session"]
    tokens: int
    bytes: int
    seconds: float


class DeletedSession(msgspec.Struct):
    id: str
    object: Literal["session"]
    deleted: Literal[True]


class SavedSession(msgspec.Struct):
    """`modified` is in seconds since 1970."""

    id: str
    object: Literal["session"]
    bytes: int
    modified: int


class SessionList(msgspec.Struct):
    """The latest first. `has_more`: there are more than are listed."""

    object: Literal["list"]
    data: list[SavedSession]
    has_more: bool


@reading(router, "/v1/sessions", **documented(SessionList, 400, 429))
async def list_sessions(state: ReadyState) -> Response:
    """The files of saved sessions."""
    done = await state.llm.client.call_session("list")
    saved = [SavedSession(file.session_id, "session", file.num_bytes, file.modified) for file in done.files]
    return json_response(SessionList("list", saved, done.is_cut))


@router.post("/v1/sessions/{session_id}/save", **documented(SessionState, *MOVING, path="session_id"))
async def save_session(http: Request, state: ReadyState) -> Response:
    """Write the latest conversation of this `session_id` to its file."""
    return await _move(http, state, "save")


@router.post("/v1/sessions/{session_id}/restore", **documented(SessionState, *MOVING, path="session_id"))
async def restore_session(http: Request, state: ReadyState) -> Response:
    """Read the session's file, so that the next turn of the conversation computes its new tokens alone."""
    return await _move(http, state, "restore")


@router.delete("/v1/sessions/{session_id}", **documented(DeletedSession, *DELETING, path="session_id"))
@router.post("/v1/sessions/{session_id}/delete", **documented(DeletedSession, *DELETING, path="session_id"))
async def delete_session(http: Request, state: ReadyState) -> Response:
    """Delete the session's file, and forget its id."""
    session_id, _, headers = await _call(http, state, "delete")
    return json_response(DeletedSession(session_id, "session", True), headers)


async def _move(http: Request, state: ServerState, action: SessionAction) -> Response:
    session_id, done, headers = await _call(http, state, action)
    moved = SessionState(session_id, "session", done.num_tokens, done.num_bytes, round(done.seconds, 4))
    return json_response(moved, headers)


async def _call(http: Request, state: ServerState, action: SessionAction) -> tuple[str, SessionDone, dict[str, str]]:
    """(session's id, result of the engine, headers of the answer). Raises `RequestError` or `SessionError`."""
    session_id: str = http.path_params["session_id"]
    headers = await _name_fields(http, state)
    return session_id, await state.llm.client.call_session(action, session_id), headers


async def _name_fields(http: Request, state: ServerState) -> dict[str, str]:
    """The header that names the fields of a body, which these routes ignore. Raises `RequestError`."""
    if not await http.body():
        return {}
    return state.tell_ignored(list(await read_body(http, state)))
