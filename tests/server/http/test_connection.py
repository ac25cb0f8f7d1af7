"""Hostile and slow clients on a real socket: each is bounded, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress

import httpx
import pytest

GUARD_SECONDS = 10
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def request(body, *, head=HEAD):
    raw = json.dumps(body).encode()
    return head + b"Content-Length: %d\r\n\r\n" % len(raw) + raw


class Client:
    """A raw socket."""

    def __init__(self, live):
        self.live = live

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.live.port)
        return self

    async def __aexit__(self, *error):
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def send(self, data):
        self.writer.write(data)
        with suppress(OSError):
            await self.writer.drain()

    async def answer(self):
        """(status, error) of one answer, whose body has a length."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), GUARD_SECONDS)
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = await asyncio.wait_for(self.reader.readexactly(length), GUARD_SECONDS)
        return int(head.split()[1]), json.loads(body).get("error")

    async def hung_up(self):
        """Wait until the server has closed the connection."""
        with suppress(ConnectionError):
            await asyncio.wait_for(self.reader.read(), GUARD_SECONDS)


async def is_served(live):
    async with httpx.AsyncClient(timeout=GUARD_SECONDS) as http:
        return (await http.post(f"{live.url}/v1/completions", json={"prompt": "a"})).status_code == 200


@pytest.mark.parametrize("num_bytes", [100_000, 3_000_000])
@pytest.mark.parametrize("kind", ["a header", "many headers", "a path", "a query"])
async def test_a_huge_head_is_431_and_the_next_client_is_served(make_live, kind, num_bytes):
    live = make_live()
    filler = b"x" * num_bytes
    heads = {
        "a header": b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Big: " + filler,
        "many headers": b"GET /version HTTP/1.1\r\nHost: localhost\r\n"
        + b"X-A: aaaaaaaaaaaa\r\n" * (num_bytes // 19)
        + b"X: y",
        "a path": b"GET /" + filler + b" HTTP/1.1\r\nHost: localhost",
        "a query": b"GET /version?" + filler + b" HTTP/1.1\r\nHost: localhost",
    }
    async with Client(live) as client:
        await client.send(heads[kind] + b"\r\n\r\n")
        with suppress(ConnectionError):  # a client that is still sending may never see the answer
            status, error = await client.answer()
            assert (status, error["code"]) == (431, "headers_too_large")
            assert "65536" in error["message"]
    assert await is_served(live)


async def test_headers_up_to_the_bound_are_taken(make_live):
    live = make_live(max_header_bytes=8000)
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{live.url}/version", headers={"x": "y" * 7000})).status_code == 200
        response = await http.get(f"{live.url}/version", headers={"x": "y" * 8000})
    assert response.status_code == 431
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"GET /version HTTP/1.1\r\n\r\n",  # no host
        b"GET /version HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
        b"GET /vers\xffion HTTP/1.1\r\nHost: localhost\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    ],
)
async def test_bytes_that_are_no_http_are_an_error_in_the_envelope(make_live, data):
    live = make_live()
    async with Client(live) as client:
        await client.send(data)
        status, error = await client.answer()
        assert status in (400, 501)
        assert error["type"] == "invalid_request_error"
        await client.hung_up()
    assert await is_served(live)


async def test_chunked_body_that_breaks_is_answered_and_harms_no_other(make_live, engine):
    live = make_live()
    async with Client(live) as client:
        await client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nZZZ\r\n")
        assert (await client.answer())[0] == 400
        await client.hung_up()
    assert engine.requests == []
    assert await is_served(live)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
async def test_a_head_that_does_not_end_is_cut(make_live, sent):
    live = make_live(read_timeout=0.2)
    async with Client(live) as client:
        await client.send(sent)
        if sent:
            status, error = await client.answer()
            assert (status, error["code"]) == (408, "request_timeout")
        await client.hung_up()
    assert await is_served(live)


async def test_a_head_that_comes_byte_by_byte_is_cut_all_the_same(make_live):
    live = make_live(read_timeout=0.3, idle_timeout=60)
    async with Client(live) as client:
        await client.send(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")  # the second head of a connection, too
        assert (await client.answer())[0] == 200

        async def dribble():
            while True:
                await client.send(b"G")
                await asyncio.sleep(0.02)

        dribbling = asyncio.create_task(dribble())
        assert (await client.answer())[0] == 408
        dribbling.cancel()


@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
async def test_a_body_that_does_not_end_is_408_and_frees_its_place(make_live, length):
    live = make_live(read_timeout=0.3, max_connections=1)
    async with Client(live) as client:
        await client.send(HEAD + length + b"\r\n\r\n")
        await client.send(b"5\r\nhello\r\n" if b"chunked" in length else b'{"prompt"')
        status, error = await client.answer()
        assert (status, error["code"]) == (408, "request_timeout")
        await client.hung_up()
    assert await is_served(live)


async def test_an_answer_may_take_longer_than_a_body(make_live, engine):
    live = make_live(read_timeout=0.2, idle_timeout=0.2, write_timeout=0.2)
    engine.hold_after = 2
    asking = asyncio.create_task(is_served(live))
    await asyncio.sleep(0.8)
    assert not asking.done()
    engine.hold_after = None
    assert await asking


async def test_an_idle_connection_is_closed(make_live):
    live = make_live(idle_timeout=0.2)
    async with Client(live) as client:
        await client.send(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.answer())[0] == 200
        await client.hung_up()


async def test_body_that_no_route_reads_is_not_received_for_ever(make_live):
    live = make_live(idle_timeout=0.2, write_timeout=0.2)
    async with Client(live) as client:
        await client.send(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert (await client.answer())[0] == 404

        async def dribble():
            while not client.writer.is_closing():
                await client.send(b"x")
                await asyncio.sleep(0.02)

        dribbling = asyncio.create_task(dribble())
        await client.hung_up()
        dribbling.cancel()


async def test_a_client_that_does_not_read_is_hung_up_on_and_its_sequences_are_aborted(make_live, engine, eventually):
    live = make_live(write_timeout=0.3, max_scores=10**9)
    engine.info.max_model_len = 10**8
    engine.reply = b"~" * 10**7
    async with Client(live) as client:
        client.writer.transport.pause_reading()
        await client.send(request({"prompt": "a", "n": 2, "max_tokens": 10**7, "stream": True, "logprobs": 5}))
        await eventually(lambda: engine.num_open == 2)
        assert await is_served_beside(live, engine)
        await eventually(lambda: engine.num_open == 0, seconds=GUARD_SECONDS)
        assert engine.num_aborted == 2


async def test_a_client_that_pauses_less_than_write_timeout_gets_its_whole_answer(make_live, engine, eventually):
    """Also when that takes longer than `write_timeout` altogether: a pause is over when the client reads on."""
    live = make_live(write_timeout=1.0)
    engine.info.max_model_len = 10**6
    engine.reply = b"~" * 3000
    async with Client(live) as client:
        await client.send(
            request(
                {"prompt": "a", "max_tokens": 3000, "stream": True, "logprobs": 20},
                head=HEAD + b"Connection: close\r\n",
            )
        )
        first = await client.reader.readuntil(b"data: ")
        [server_side] = live.server.server_state.connections
        server_side.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        client.writer.transport.pause_reading()
        await eventually(lambda: server_side.flow.write_paused)
        engine.hold_after = 0
        reading = asyncio.create_task(client.reader.read())
        client.writer.transport.resume_reading()
        await eventually(lambda: not server_side.flow.write_paused)
        await asyncio.sleep(1.2)
        engine.hold_after = None
        answer = first + await asyncio.wait_for(reading, GUARD_SECONDS)
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert answer.count(b'"text":"~"') == 3000
    assert engine.num_aborted == 0


async def is_served_beside(live, engine):
    """Another client, whose answer is short."""
    async with httpx.AsyncClient(timeout=GUARD_SECONDS) as http:
        response = await http.post(f"{live.url}/v1/completions", json={"prompt": "a", "max_tokens": 3})
    return response.status_code == 200


async def test_of_too_many_sockets_the_longest_idle_goes_and_health_is_answered(make_live, engine, eventually):
    live = make_live(max_connections=4)
    engine.hold_after = 1
    open_clients = [Client(live) for _ in range(40)]
    streaming, idle = open_clients[:3], open_clients[3:]
    for client in streaming:
        await client.__aenter__()
        await client.send(request({"prompt": "a", "stream": True}))
        await client.reader.readuntil(b"data: ")
    for client in idle:
        await client.__aenter__()
        await client.send(b"GET /")
    await idle[-1].hung_up()  # one too many, and silent
    await eventually(lambda: len(live.server.server_state.connections) <= 8)
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"{live.url}/health")).status_code == 200
    await idle[0].hung_up()
    engine.hold_after = None
    for client in streaming:
        assert (await asyncio.wait_for(client.reader.readuntil(b"[DONE]"), GUARD_SECONDS)).endswith(b"[DONE]")
    for client in open_clients:
        await client.__aexit__()


async def test_pipelined_requests_are_answered_in_order(make_live):
    live = make_live()
    async with Client(live) as client:
        texts = [request({"prompt": "a", "max_tokens": i}) for i in (1, 2, 3)]
        await client.send(b"".join(texts) + b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"garbage\r\n\r\n")
        assert [(await client.answer())[0] for _ in range(5)] == [200, 200, 200, 404, 400]


@pytest.mark.parametrize("stream", [False, True])
async def test_half_closed_connection_is_answered_or_aborted_and_never_hangs(make_live, engine, eventually, stream):
    live = make_live()
    async with Client(live) as client:
        await client.send(request({"prompt": "a", "stream": stream}))
        client.writer.write_eof()
        await client.hung_up()
    await eventually(lambda: engine.num_open == 0)
    assert await is_served(live)


async def test_a_websocket_is_an_ordinary_request(make_live):
    live = make_live()
    async with Client(live) as client:
        await client.send(
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert (await client.answer())[0] == 200
