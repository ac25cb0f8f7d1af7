"""The folder of saved sessions. Only this user can read its files. A file has a temporary name until it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError, SessionError
from ..messages import SessionFile

SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
SESSION_ID_FORM = "1 to 64 letters, digits, '-' and '_'"
SUFFIX = ".safetensors"
UNFINISHED = ".part"
STALE_SECONDS = 3600
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_LISTED = 1000


def prepare(folder: Path) -> Path:
    """Make the folder if it is missing, and remove unfinished files that have not changed for STALE_SECONDS: their
    servers were killed. Returns the path with ~ expanded. Raises `ConfigError`."""
    folder = folder.expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        list_files(folder)
        for path in folder.glob(f".*{UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - os.lstat(path).st_mtime > STALE_SECONDS:
                    path.unlink()
    except OSError as error:
        problem = "is a file, not a folder" if os.path.isfile(folder) else str(error.strerror)
        raise ConfigError(f"session_folder = {folder}: {problem}; name a folder that can be written to") from None
    return folder


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """Give a descriptor to write to. When the block ends without an error, the file gets the name `path`, and only this
    user can read it. Until then, and after an error, an earlier file of that name stays. Raises `SessionError`."""
    temporary = None
    try:
        # mkstemp gives the file mode 0600.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=UNFINISHED, dir=path.parent)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except IsADirectoryError:
        raise _is_a_folder() from None
    except OSError as error:
        message = f"the session could not be written to session_folder: {error.strerror}"
        raise SessionError(message, "session_no_room" if error.errno in NO_ROOM else "session_failed") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def list_files(folder: Path) -> tuple[list[SessionFile], bool]:
    """(the saved sessions, the latest first, at most MAX_LISTED; whether there are more). Opens no file."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            session_id = entry.name.removesuffix(SUFFIX)
            is_named_so = session_id != entry.name and SESSION_ID.fullmatch(session_id)
            if is_named_so and entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                found.append(SessionFile(session_id, status.st_size, int(status.st_mtime)))
    found.sort(key=lambda file: (-file.modified, file.session_id))
    return found[:MAX_LISTED], len(found) > MAX_LISTED


def delete_file(path: Path) -> int:
    """Delete a session's file. Returns its size in bytes. Raises `SessionError` if there is no such file."""
    try:
        num_bytes = os.lstat(path).st_size
        path.unlink()
    except FileNotFoundError:
        raise not_found() from None
    except IsADirectoryError:
        raise _is_a_folder() from None
    except OSError as error:
        raise SessionError(f"the session's file cannot be deleted: {error.strerror}", "session_failed") from None
    return num_bytes


def not_found() -> SessionError:
    return SessionError("there is no saved session of this id; GET /v1/sessions lists them", "session_not_found")


def _is_a_folder() -> SessionError:
    return SessionError(
        "a folder has the name of the session's file; remove it from session_folder, or take another id",
        "session_damaged",
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
