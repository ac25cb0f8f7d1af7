"""Every error a user can cause, as one tree. Each message names the field, the bound, the value and the remedy.

LeydenError
├── ConfigError            a setting is wrong                        exit code 2
├── CheckpointError        a model folder is wrong                   exit code 2
├── WeightFormatError      a setting asks for weights in a format
│                          that the model cannot have                exit code 2
│   (both are raised in `models.errors`, which this module re-exports)
├── RequestError           a request cannot be served                HTTP 400
│   └── ContextLengthError     prompt and answer do not fit          HTTP 400, code context_length_exceeded
├── QueueFullError         too many requests wait                    HTTP 429
├── QueueTimeoutError      a request waited too long for its start   HTTP 503
├── SessionError           a session cannot be saved or restored     HTTP by its code: 400, 404, 409, 429, 500, 507
├── StoppingError          the server stops before the answer ends   HTTP 503
└── EngineDeadError        the engine is gone                        HTTP 500 / 503
"""

from __future__ import annotations

from typing import Literal

from ..models.errors import CheckpointError, LeydenError, WeightFormatError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "EngineDeadError",
    "LeydenError",
    "QueueFullError",
    "QueueTimeoutError",
    "RequestError",
    "SessionError",
    "SessionErrorCode",
    "StoppingError",
    "WeightFormatError",
]

QUEUE_TIMEOUT = "the request waited too long for its start (setting max_queue_seconds); try again later"

SessionErrorCode = Literal[
    "sessions_disabled",  # the setting session_folder is missing
    "session_id_invalid",
    "session_not_found",
    "session_evicted",  # the prefix cache has dropped the conversation
    "session_mismatch",  # the file is of another model or of other settings
    "session_damaged",  # the file's content is wrong
    "session_no_room",  # in the pools, or on the disk
    "session_queue_full",
    "session_failed",  # a fault of the server or of the disk
]


class ConfigError(LeydenError):
    """A setting is wrong or does not fit the machine."""


class RequestError(LeydenError):
    """A request that can never be served as it is. `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """Prompt and requested answer do not fit the context."""


class QueueFullError(LeydenError):
    """The waiting queue is at its bound; `retry_after` is a hint in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueTimeoutError(LeydenError):
    """The request was not started within its `max_queue_seconds`."""

    def __init__(self, message: str = QUEUE_TIMEOUT) -> None:
        super().__init__(message)


class SessionError(LeydenError):
    """A session could not be saved, restored or deleted; nothing has changed."""

    def __init__(self, message: str, code: SessionErrorCode) -> None:
        super().__init__(message)
        self.code = code


class StoppingError(LeydenError):
    """The engine lives, but its owner stops before the answer is complete."""


class EngineDeadError(LeydenError):
    """The engine stopped; nothing can be served until the process is started again."""
