"""The app over a scripted engine, with an ASGI client and a real socket server."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx
import pytest
import uvicorn
from leyden.configs.schema import ServerConfig
from leyden.engine.async_llm import AsyncLLM
from leyden.server.http.app import create_app
from leyden.server.http.connection import uvicorn_config
from scripted import FakeEngine, FakeTokenizer


class LiveServer:
    """The app behind uvicorn on a free port, in a thread."""

    def __init__(self, app, settings):
        config = uvicorn_config(app, settings, host="127.0.0.1", port=0)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.server.started:
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def tokenizer():
    return FakeTokenizer()


@pytest.fixture
def make_app(engine, tokenizer):
    def make(**settings):
        return create_app(AsyncLLM(engine, tokenizer), ServerConfig(**settings), model_name="tiny")

    return make


@pytest.fixture
async def make_client(make_app):
    """make_client(app=None, **settings) -> an httpx client that talks to the app without a socket."""
    clients = []

    def make(app=None, **settings):
        transport = httpx.ASGITransport(app=app or make_app(**settings))
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20))
        return clients[-1]

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture
def complete(client):
    """Ask /v1/completions: complete(prompt=..., ...) -> response."""

    async def ask(**body):
        return await client.post("/v1/completions", json={"prompt": "Hi", **body})

    return ask


@pytest.fixture
def chat(client):
    """Ask /v1/chat/completions: chat(messages=..., ...) -> response."""

    async def ask(**body):
        messages = [{"role": "user", "content": "Hi"}]
        return await client.post("/v1/chat/completions", json={"messages": messages, **body})

    return ask


@pytest.fixture
def asks(complete, chat):
    """Both generation routes by name."""
    return {"complete": complete, "chat": chat}


@pytest.fixture
def chunks_of():
    """The JSON chunks of a finished stream; checks that it is well formed and ends in [DONE]."""

    def parse(response):
        assert response.headers["content-type"].split(";")[0] == "text/event-stream"
        frames = response.text.split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        assert all(frame.startswith("data: ") for frame in frames[:-1])
        return [json.loads(frame[len("data: ") :]) for frame in frames[:-2]]

    return parse


@pytest.fixture
def error_of():
    """The error of a response; checks that it has exactly OpenAI's envelope."""

    def parse(response, status):
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        body = response.json()
        assert list(body) == ["error"]
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return body["error"]

    return parse


@pytest.fixture
def eventually():
    """Wait until a claim holds, or fail."""

    async def wait(claim, seconds=5.0):
        deadline = time.monotonic() + seconds
        while not claim():
            assert time.monotonic() < deadline, "it never came true"
            await asyncio.sleep(0.002)

    return wait


@pytest.fixture
def make_live(make_app):
    servers = []

    def make(app=None, **settings):
        servers.append(LiveServer(app or make_app(**settings), ServerConfig(**settings)))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()
