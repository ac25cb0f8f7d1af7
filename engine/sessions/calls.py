"""The session calls: save a conversation's state to a file, restore it after a restart, delete and list files.

A file holds a conversation's part of the prefix cache: its tokens, their keys and values, and the states at its end.
Sampling needs nothing else: a draw depends on the seed and the position, and penalties count tokens.

Each call is a generator. It runs in the engine's thread, between two steps, and may use the scheduler and the cache.
The functions that it yields run in another thread, while steps go on. Calls run one after another.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ...kernels import use_device
from ...models.loading.fingerprint import fingerprint
from ..errors import SessionError
from ..execution.runner import ModelRunner
from ..execution.served_model import ServedModel
from ..memory.operations import OperationQueue
from ..messages import SessionCall, SessionDone
from ..prefix.reuse import Reuse
from . import folder as session_folder
from .carrier import Carrier, Location, slots_of
from .folder import SESSION_ID, SESSION_ID_FORM, SUFFIX, delete_file, list_files
from .format import MAX_STATES, Layout
from .reader import read_session

logger = logging.getLogger("leyden.engine")

MAX_CALLS = 64  # waiting calls
Work = Generator[Callable[[], Any], Any, SessionDone]


class Sessions:
    """The queue of session calls. `folder` None = every call is refused."""

    def __init__(
        self,
        folder: Path | None,
        runner: ModelRunner,
        reuse: Reuse,
        operations: OperationQueue,
        max_model_len: int,
    ) -> None:
        self.folder = None if folder is None else session_folder.prepare(folder)
        self._runner, self._reuse, self._operations = runner, reuse, operations
        self._waiting: deque[SessionCall] = deque()
        self._refused: list[SessionDone] = []
        self._current: tuple[SessionCall, Work, Future[Any]] | None = None
        if self.folder is not None:
            self._carrier = Carrier(runner.pools.snapshots, runner.pools.caches, runner.device)
            self._layout = _layout(runner.served, max_model_len)
            self._thread = ThreadPoolExecutor(1, "session", use_device, (runner.device,))

    @property
    def is_busy(self) -> bool:
        return bool(self._current or self._waiting or self._refused)

    def add(self, call: SessionCall) -> None:
        """Queue a call. A later `advance` returns its answer, also if it is refused."""
        try:
            self._check(call)
        except SessionError as error:
            self._refused.append(_refusal(call, error))
        else:
            self._waiting.append(call)

    def advance(self) -> list[SessionDone]:
        """Run calls as far as possible without waiting for the other thread. Returns the answers of finished calls."""
        done, self._refused = self._refused, []
        while self._current is not None or self._waiting:
            if self._current is None:
                call = self._waiting.popleft()
                work = self._begin(call)
                answer = self._go_on(call, work, partial(next, work))
            else:
                call, work, future = self._current
                if not future.done():
                    break
                self._current = None
                error = future.exception()
                resume = partial(work.send, future.result()) if error is None else partial(work.throw, error)
                answer = self._go_on(call, work, resume)
            if answer is not None:
                done.append(answer)
        return done

    def _go_on(self, call: SessionCall, work: Work, resume: Callable[[], Callable[[], Any]]) -> SessionDone | None:
        """Run a call until it yields its next function, and submit that. Returns the answer of a finished call."""
        try:
            self._current = (call, work, self._thread.submit(resume()))
            return None
        except StopIteration as end:
            answer: SessionDone = end.value
            return answer
        except SessionError as error:
            return _refusal(call, error)
        except Exception:
            logger.exception("session %s: %s failed", call.session_id, call.action)
            return _refusal(
                call, SessionError("the session call failed; the server's log has the details", "session_failed")
            )

    def _check(self, call: SessionCall) -> None:
        if self.folder is None:
            raise SessionError("sessions are off: start the server with session_folder set", "sessions_disabled")
        if call.action != "list" and not SESSION_ID.fullmatch(call.session_id):
            raise SessionError(
                f"the session's id must be {SESSION_ID_FORM}, got {call.session_id[:80]!r}",
                "session_id_invalid",
            )
        if len(self._waiting) >= MAX_CALLS:
            raise SessionError(
                f"{MAX_CALLS} calls of sessions are waiting already; try again later", "session_queue_full"
            )

    def _begin(self, call: SessionCall) -> Work:
        works = {"save": self._save, "restore": self._restore, "delete": self._delete, "list": self._list}
        return works[call.action](call, time.perf_counter())

    def _path(self, call: SessionCall) -> Path:
        assert self.folder is not None
        return self.folder / f"{call.session_id}{SUFFIX}"

    def _save(self, call: SessionCall, started: float) -> Work:
        conversation = self._reuse.conversations.find(call.session_id)
        if conversation is None:
            raise SessionError(
                f"no conversation is known as {call.session_id!r}: send its text with this session_id before, and let "
                "the answer end",
                "session_not_found",
            )
        if conversation.node is None:
            raise SessionError(
                "the prefix cache has forgotten the conversation, or has no snapshots at all: send the conversation "
                "again, and save it at once; or raise snapshots or num_kv_blocks",
                "session_evicted",
            )
        cache, salt = self._reuse.cache, conversation.salt
        self._runner.copier.make(self._operations.take())
        tokens, ends, lease = cache.lease(conversation.node, MAX_STATES)
        try:
            location = Location(lease.snapshots, slots_of(lease.blocks, len(tokens), cache.blocks.block_size))
            write = partial(self._carrier.save, self._path(call), self._layout, tokens, ends, salt, location)
            num_bytes = yield partial(_after, self._carrier.mark(), write)
        finally:
            cache.let_go(lease)
        return _done(call, started, len(tokens), num_bytes)

    def _restore(self, call: SessionCall, started: float) -> Work:
        reuse, cache = self._reuse, self._reuse.cache
        header = yield partial(read_session, self._path(call), self._layout)
        tokens, ends, salt = header.tokens, header.ends, header.cache_salt
        node = cache.match(tokens, salt).node
        if node is None or node.end < len(tokens):  # otherwise the cache holds the whole session
            num_blocks = cache.blocks.blocks_for(len(tokens))
            lease, moves = cache.take(num_blocks, len(ends))
            self._operations.add(*moves)
            if lease is None:
                raise _no_room(len(tokens), num_blocks, cache.num_snapshots, cache.blocks.num_blocks)
            try:
                self._runner.copier.make(self._operations.take())  # the moves read memory that the load overwrites
                location = Location(lease.snapshots, slots_of(lease.blocks, len(tokens), cache.blocks.block_size))
                yield partial(_after, self._carrier.mark(), partial(self._carrier.load, header, self._layout, location))
            except BaseException:
                cache.let_go(lease)
                raise
            node = cache.adopt(lease, tokens, ends[-len(lease.snapshots) :], salt)
        reuse.conversations.note(call.session_id, node, salt)
        return _done(call, started, len(tokens), header.num_bytes)

    def _delete(self, call: SessionCall, started: float) -> Work:
        self._reuse.conversations.forget(call.session_id)
        num_bytes = yield partial(delete_file, self._path(call))
        return _done(call, started, 0, num_bytes)

    def _list(self, call: SessionCall, started: float) -> Work:
        assert self.folder is not None
        files, is_cut = yield partial(list_files, self.folder)
        done = _done(call, started, 0, sum(file.num_bytes for file in files))
        done.files, done.is_cut = files, is_cut
        return done


def _layout(served: ServedModel, max_model_len: int) -> Layout:
    return Layout(
        fingerprint=fingerprint(served.spec, served.model),
        caches=served.model.caches,
        dtypes=served.snapshot_dtypes,
        vocab_size=served.spec.vocab_size,
        max_model_len=max_model_len,
    )


def _after(wait: Callable[[], None], work: Callable[[], Any]) -> Any:
    wait()
    return work()


def _no_room(num_tokens: int, num_blocks: int, num_snapshots: int, capacity: int) -> SessionError:
    if not num_snapshots:
        message = "there are no snapshots to restore a session to: set prefix_cache, and snapshots above 0"
    else:
        message = (
            f"the session's {num_tokens} tokens need {num_blocks} of {capacity} KV blocks, and running sequences hold "
            "too many of them; try again later, or raise num_kv_blocks or memory_fraction"
        )
    return SessionError(message, "session_no_room")


def _done(call: SessionCall, started: float, num_tokens: int, num_bytes: int) -> SessionDone:
    seconds = time.perf_counter() - started
    return SessionDone(call_id=call.call_id, num_tokens=num_tokens, num_bytes=num_bytes, seconds=seconds)


def _refusal(call: SessionCall, error: SessionError) -> SessionDone:
    return SessionDone(call_id=call.call_id, error=str(error), error_code=error.code)
