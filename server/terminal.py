"""`leyden chat`: a conversation with a running server, in the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from ..engine.errors import LeydenError
from .bench.target import Target

TIMEOUT = httpx.Timeout(connect=5.0, read=300.0, write=30.0, pool=5.0)
HELP = "Type a message; /reset starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


class ChatError(LeydenError):
    """The server cannot be reached or refused."""

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
        if arguments.max_tokens is not None:  # else the server fits it to the context
            settings["max_tokens"] = arguments.max_tokens
        print(f"{settings['model']} at {target.url}. {HELP}")
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
        if text == "/reset":
            messages = list(opening)
            continue
        turn = [*messages, {"role": "user", "content": text}]
        try:
            answer = _answer(http, settings | {"messages": turn})
        except ChatError as error:
            has_failed = True
            print(f"error: {error}\nYour message is taken back; /reset starts over.", file=sys.stderr)
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
            print(thought + part, end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        if parts:
            print()
    return "".join(parts)


def _stream(http: httpx.Client, body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what the model thinks, what it says), piece by piece."""
    try:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ChatError(_message(response))
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ChatError(event["error"]["message"])
                    for choice in event["choices"]:
                        delta = choice["delta"]
                        yield delta.get("reasoning_content") or "", delta.get("content") or ""
    except httpx.HTTPError as error:
        raise ChatError(f"{http.base_url}: {error or type(error).__name__}") from error


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
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code}: {response.text[:200]}"
