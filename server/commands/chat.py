"""`leyden chat`: a conversation with a running server, in the terminal."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from ...benchmarks.load.target import Target
from ...engine.errors import LeydenError
from ...engine.text.screen import for_screen

TIMEOUT = httpx.Timeout(connect=5.0, read=300.0, write=30.0, pool=5.0)
HINT = "Type a message; /help lists the commands."
HELP = """\
/help   lists the commands
/reset  forgets the conversation; the system message stays
/quit   leaves, as Ctrl-D does
Ctrl-C  stops an answer, and leaves where none is under way"""
NO_KEY = "no key was sent; give one by --api-key or in LEYDEN_API_KEY"
WRONG_KEY = "the server does not take the key of --api-key or LEYDEN_API_KEY"


class ChatError(LeydenError):
    """The server could not be reached, or it refused the request."""

    is_failure = True


def chat(arguments: argparse.Namespace) -> int:
    """Read, send, print as it streams, until the user leaves; 1 when the last turn failed.

    Raises `ChatError` before the first turn, and `BenchError` when the url is no address.
    """
    key = arguments.api_key or os.environ.get("LEYDEN_API_KEY", "").split(",")[0]
    target = Target.parse(arguments.url, key)
    with httpx.Client(base_url=target.url, headers=target.headers, timeout=TIMEOUT) as http:
        settings = {
            "model": arguments.model or _first_model(http),
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "stream": True,
        }
        if arguments.max_tokens is not None:  # the server's default is what the context has left
            settings["max_tokens"] = arguments.max_tokens
        print(for_screen(f"{settings['model']} at {target.url}. {HINT}"))
        has_failed = _converse(http, settings, arguments.system)
    return int(has_failed)


def _converse(http: httpx.Client, settings: dict[str, Any], system: str | None) -> bool:
    """Turn after turn, until the user leaves. Returns whether the last one failed."""
    opening = [{"role": "system", "content": system}] if system else []
    messages, has_failed = list(opening), False
    while (text := _ask()) is not None:
        if not text:
            continue
        has_failed = False
        if text == "/help":
            print(HELP)
            continue
        if text == "/reset":
            messages = list(opening)
            continue
        if re.fullmatch(r"/\w+", text):
            print(f"{text} is no command; /help lists those there are")
            continue
        turn = [*messages, {"role": "user", "content": text}]
        try:
            answer = _answer(http, settings | {"messages": turn})
        except ChatError as error:
            has_failed = True
            print(for_screen(f"error: {error}\nYour message is taken back; /reset starts over."), file=sys.stderr)
        else:
            messages = [*turn, {"role": "assistant", "content": answer}]
    return has_failed


def _ask() -> str | None:
    """The next line, or None when the user leaves."""
    try:
        text = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if text == "/quit" else text


def _answer(http: httpx.Client, body: dict[str, Any]) -> str:
    """Print the answer as it comes; Ctrl-C ends it, which the server sees as a disconnect."""
    parts: list[str] = []
    is_thinking = False
    try:
        for thought, part in _stream(http, body):
            if is_thinking and part:
                print("\n")
            is_thinking = bool(thought) or (is_thinking and not part)
            parts.append(part)
            print(for_screen(thought + part), end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        if parts:
            print()
    return "".join(parts)


def _stream(http: httpx.Client, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(reasoning, content) of the answer, piece by piece. Raises `ChatError`."""
    try:
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        with http.stream("POST", "/v1/chat/completions", content=content, headers=headers) as response:
            if response.status_code != 200:
                response.read()
                raise ChatError(_message(response))
            for event in _events(response):
                yield from _pieces(event)
    except httpx.HTTPError as error:
        raise ChatError(f"{http.base_url}: {error or type(error).__name__}") from error


def _events(response: httpx.Response) -> Iterator[bytes]:
    """The payloads of the `data:` lines. Only a newline ends a line here; httpx would split at U+2028, too."""
    rest = b""
    for data in response.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            payload = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and payload != b"[DONE]":
                yield payload


def _pieces(event: bytes) -> Iterator[tuple[str, str]]:
    """(reasoning, content) of one event. Raises `ChatError` for an error of the server and for any other event."""
    try:
        chunk = json.loads(event)
        if "error" in chunk:
            raise ChatError(str(chunk["error"]["message"]))
        deltas = [choice["delta"] for choice in chunk["choices"]]
        pieces = [(delta.get("reasoning_content") or "", delta.get("content") or "") for delta in deltas]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ChatError(
            f"the server sent an event that is none of a chat: {event[:200].decode(errors='replace')}"
        ) from None
    yield from pieces


def _first_model(http: httpx.Client) -> str:
    try:
        response = http.get("/v1/models")
    except httpx.HTTPError as error:
        raise ChatError(f"no server at {http.base_url} ({error}); start one with `leyden serve`") from error
    if response.status_code != 200:
        raise ChatError(_message(response))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        message = f"{http.base_url} answers no list of models; is --url that of an OpenAI-compatible server?"
        raise ChatError(message) from None


def _message(response: httpx.Response) -> str:
    try:
        told = f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        told = f"{response.status_code}: {response.text[:200]}"
    if response.status_code != 401:
        return told
    return f"{told} ({WRONG_KEY if 'authorization' in response.request.headers else NO_KEY})"
