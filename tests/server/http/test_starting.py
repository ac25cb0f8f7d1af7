"""Before the model is loaded the port says so, and nobody who asks then is in the way of the server that follows."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from leyden.configs.schema import Settings
from leyden.engine.errors import ConfigError
from leyden.server.commands import serve
from leyden.server.commands.serve import BACKLOG, bind
from leyden.server.http.starting import refusing


@pytest.fixture
def listener():
    with bind("127.0.0.1", 0) as sock:
        yield sock


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_everything_is_503_with_retry_after_in_the_envelope(listener, error_of, method):
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/health"
    async with refusing(listener, BACKLOG, read_timeout=5), httpx.AsyncClient() as http:
        response = await http.request(method, url, content=b"x" * 1_000_000 * (method == "POST"))
    assert error_of(response, 503)["type"] == "overloaded"
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"x" * 1_000_000], ids=["nothing", "half a head", "no head"])
async def test_client_without_a_request_is_disconnected(listener, sent):
    async with refusing(listener, BACKLOG, read_timeout=0.1):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(sent)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()


async def test_client_that_connects_at_the_end_is_served_by_the_next_server(listener):
    async with refusing(listener, BACKLOG, read_timeout=5):
        pass
    reader, writer = await asyncio.open_connection(*listener.getsockname())

    async def greet(_, client):
        client.write(b"served")
        client.close()

    async with await asyncio.start_server(greet, sock=listener):
        assert await asyncio.wait_for(reader.read(), 5) == b"served"
    writer.close()


async def _serves(*arguments):
    return serve.Ending(0, "SIGTERM")


def test_variables_of_kubernetes_are_told_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(serve, "_serve", _serves)
    monkeypatch.setattr(serve.logs, "configure", lambda *arguments: None)
    monkeypatch.setenv("LEYDEN_PORT", "tcp://10.0.0.7:8000")
    monkeypatch.setenv("LEYDEN_SERVICE_HOST", "10.0.0.7")
    caplog.set_level("INFO")
    assert serve.serve(Settings(port=0)) == 0
    [line] = [record.getMessage() for record in caplog.records if "Kubernetes" in record.getMessage()]
    assert line.startswith("LEYDEN_PORT, LEYDEN_SERVICE_HOST: ")


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("api_key", [""], "must not be empty"),
        ("api_key_file", "missing", "No such file"),
        ("session_folder", "file", "is a file, not a folder"),
        ("session_folder", "file/below", "Not a directory"),
    ],
)
def test_keys_and_folders_are_looked_at_before_the_model_is_loaded(tmp_path, monkeypatch, name, wrong, words):
    (tmp_path / "file").write_text("")

    def started(*arguments):
        raise AssertionError("the engine was started")

    monkeypatch.setattr(serve, "_serve", started)
    monkeypatch.setattr(serve.logs, "configure", lambda *arguments: None)
    settings = Settings(port=0, **{name: wrong if isinstance(wrong, list) else tmp_path / wrong})
    with pytest.raises(ConfigError, match=f"{name}.*{words}"):
        serve.serve(settings)


async def test_small_answers_on_a_connection_that_is_kept_are_not_held_back(listener):
    """Nagle's algorithm would hold the second packet of each until the client has acknowledged the first: 40 ms."""
    delays = asyncio.Queue()

    async def note(reader, writer):
        sock = writer.get_extra_info("socket")
        delays.put_nowait(not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(note, sock=listener.dup()):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await asyncio.wait_for(delays.get(), 5) is False
        writer.close()
