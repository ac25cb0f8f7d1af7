"""Every error as OpenAI's envelope: {"error": {"message", "type", "param", "code"}}. One table, used by all routes."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from ..engine.errors import (
    ContextLengthError,
    EngineDeadError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    SessionError,
    SessionErrorCode,
    StoppingError,
)
from ..engine.logs import printable

logger = logging.getLogger("leyden.server")

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded",
    507: "overloaded",
}
SESSION_STATUS: dict[SessionErrorCode, int] = {
    "sessions_disabled": 400,
    "session_id_invalid": 400,
    "session_not_found": 404,
    "session_evicted": 409,
    "session_mismatch": 409,
    "session_damaged": 409,
    "session_queue_full": 429,
    "session_failed": 500,
    "session_no_room": 507,
}
ERROR_CODES = {404: "unknown_url", 405: "method_not_allowed"}
INTERNAL_ERROR = "internal_error"
RETRY_AFTER_SECONDS = "1"
MAX_MESSAGE_CHARS = 1000
MAX_PARAM_CHARS = 100
MAX_PATH_CHARS = 200


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    error: ErrorBody


class ApiError(Exception):
    """An error with its HTTP status, headers and fields of the envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = printable(message[:MAX_MESSAGE_CHARS])
        self.param = None if param is None else printable(param[:MAX_PARAM_CHARS])
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return ERROR_TYPES.get(self.status, fallback)

    @property
    def reason(self) -> str:
        """One word for the metrics; it holds no user input."""
        return self.code or self.type

    def envelope(self) -> bytes:
        return msgspec.json.encode(ErrorEnvelope(ErrorBody(printable(self.message), self.type, self.param, self.code)))


class UnsupportedParameterError(RequestError):
    """A documented field that this server does not implement."""


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""


def overloaded(message: str) -> ApiError:
    return ApiError(503, message, headers={"Retry-After": RETRY_AFTER_SECONDS})


def describe(error: Exception) -> ApiError:
    """The answer to an exception. The answer to an unknown exception tells nothing of the inside."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
        case UnsupportedParameterError():
            return ApiError(400, str(error), param=error.param, code="unsupported_parameter")
        case UnknownModelError():
            return ApiError(404, str(error), param=error.param, code="model_not_found")
        case RequestError():
            return ApiError(400, str(error), param=error.param)
        case QueueFullError():
            headers = {"Retry-After": str(error.retry_after)}
            return ApiError(429, str(error), code="rate_limit_exceeded", headers=headers)
        case QueueTimeoutError() | StoppingError():
            return overloaded(str(error))
        case SessionError():
            return _describe_session(error)
        case EngineDeadError():
            return ApiError(500, "the engine stopped before the answer was complete", code="engine_dead")
        case HTTPException():
            return _describe_http(error)
        case _:
            return ApiError(500, "an internal error; the server's log has the details", code=INTERNAL_ERROR)


def log_failure(scope: Scope, error: Exception, answer: ApiError) -> None:
    """Log one line for a request that failed: a fault of the server as an error, a refusal at debug.

    Only an internal error has a traceback: an engine's death hits every request. A refusal's line has its reason but
    not its message, which may quote the request.
    """
    about = {"request_id": scope["state"]["request_id"]}
    if answer.status == 500:
        trace = error if answer.code == INTERNAL_ERROR else None
        logger.error("the request failed (%s): %s", answer.code, type(error).__name__, exc_info=trace, extra=about)
    else:
        path = scope["path"][:MAX_PATH_CHARS]
        logger.debug("refused: %s %s: %d %s", scope["method"], path, answer.status, answer.reason, extra=about)


def error_response(error: ApiError) -> Response:
    return Response(error.envelope(), error.status, error.headers, media_type="application/json")


def _describe_session(error: SessionError) -> ApiError:
    status = SESSION_STATUS[error.code]
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if status == 429 else None
    param = "session_id" if error.code == "session_id_invalid" else None
    return ApiError(status, str(error), param=param, code=error.code, headers=headers)


def unknown_route(path: str, known: Collection[str]) -> ApiError:
    """404, with the known path that was probably meant: users give clients a base URL with `/v1` or without, and with a
    slash at its end or without."""
    bare = re.sub(r"/{2,}", "/", path).rstrip("/")
    rest = re.sub(r"^(/v1)+(?=/)", "", bare)
    meant = next((each for each in (bare, f"/v1{rest}", rest) if each in known), None)
    hint = f"did you mean {meant}? " if meant else ""
    message = f"no such route; {hint}GET /openapi.json lists them all"
    return ApiError(404, message, code=ERROR_CODES[404])


def _describe_http(error: HTTPException) -> ApiError:
    """The answer to an error of the router: unknown route, wrong method."""
    phrases = {
        405: "this route does not take that method; the Allow header lists those it takes",
    }
    message = phrases.get(error.status_code) or HTTPStatus(error.status_code).phrase
    code = ERROR_CODES.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers)
