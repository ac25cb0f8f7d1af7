"""The context of a running engine: a loaded model inside, and a stopped process behind it."""

from __future__ import annotations

import asyncio

import pytest
from leyden.configs.schema import Settings
from leyden.engine.errors import ConfigError, EngineDeadError
from leyden.server.commands import engine as running
from scripted import FakeEngine


class Client(FakeEngine):
    """A scripted engine that loads until `loaded` is set, and counts how often it is closed."""

    def __init__(self):
        super().__init__()
        self.loaded, self.num_closed, self.failure = asyncio.Event(), 0, None

    async def start(self):
        await self.loaded.wait()
        if self.failure is not None:
            raise self.failure
        return self.info

    async def close(self):
        self.num_closed += 1


@pytest.fixture
def client(monkeypatch, tokenizer):
    client = Client()
    monkeypatch.setattr(running, "ProcessClient", lambda config, **settings: client)
    monkeypatch.setattr(running.Tokenizer, "of", lambda config: tokenizer)
    return client


async def test_engine_is_stopped_when_its_context_ends(client):
    client.loaded.set()
    async with running.running_engine(Settings(model="tiny")) as engine:
        assert engine.llm.client is client
        assert not client.num_closed
    assert client.num_closed == 1


async def test_engine_is_stopped_when_its_start_is_cancelled(client):
    starting = asyncio.create_task(running.running_engine(Settings(model="tiny")).__aenter__())
    await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert client.num_closed == 1


async def test_engine_that_dies_while_it_loads_is_told_and_stopped(client):
    client.failure = EngineDeadError("out of memory")
    client.loaded.set()
    with pytest.raises(EngineDeadError, match="out of memory"):
        async with running.running_engine(Settings(model="tiny")):
            pass
    assert client.num_closed == 1


async def test_setting_that_contradicts_the_template_ends_the_start_before_the_load(client):
    with pytest.raises(ConfigError, match="tool_call_parser"):
        async with running.running_engine(Settings(model="tiny", tool_call_parser="hermes")):
            pass
    assert client.num_closed == 1
    assert not client.loaded.is_set()
