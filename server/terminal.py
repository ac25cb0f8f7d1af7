"""`leyden chat`: a conversation with a running server, in the terminal."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any

import httpx

from ..engine.errors import LeydenError

TIMEOUT = httpx.Timeout(connect=5.0, read=300.0, write=30.0, pool=5.0)
HELP = "Type a message; /reset starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


class ChatError(LeydenError):
    """The server cannot be reached or refused."""

    is_failure = True


def chat(arguments: argparse.Namespace) -> int:
    """Read, send, print as it streams, until the user leaves. Raises `ChatError`."""
    key = arguments.api_key or os.environ.get("LEYDEN_API_KEY", "").split(",")[0]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=arguments.url, headers=headers, timeout=TIMEOUT) as http:
        model = arguments.model or _first_model(http)
        print(f"{model} at {arguments.url}. {HELP}")
        opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
        messages = list(opening)
        while (text := _ask()) is not None:
            if text == "/reset":
                messages = list(opening)
            elif text:
                messages.append({"role": "user", "content": text})
                body = {
                    "model": model,
                    "messages": messages,
                    "stream": True,
                    "max_tokens": arguments.max_tokens,
                    "temperature": arguments.temperature,
                    "top_p": arguments.top_p,
                }
                messages.append({"role": "assistant", "content": _answer(http, body)})
    return 0


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
    return response.json()["data"][0]["id"]


def _message(response: httpx.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code}: {response.text[:200]}"
