from __future__ import annotations

import asyncio
import json

import pytest
from callers import GUARD_SECONDS, Caller

BODIES = {
    "one": {"prompt": "a"},
    "many": {"prompt": ["a", "b"], "n": 2},
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 3], ids=["before the first token", "in the middle"])
async def test_a_client_that_leaves_aborts_all_its_sequences(make_app, engine, eventually, body, stream, hold_after):
    engine.hold_after = hold_after
    caller = Caller(make_app(), {**body, "stream": stream})
    num_jobs = 4 if "n" in body else 1
    await eventually(lambda: engine.num_open == num_jobs)
    if stream and hold_after:
        await eventually(lambda: len(caller.messages) > hold_after)
    caller.leave()
    await caller.ended()
    assert engine.num_open == 0
    assert engine.num_aborted == num_jobs


async def test_a_socket_that_breaks_in_mid_stream_aborts_too(make_app, engine, eventually):
    engine.choose_reply = lambda request: b"x" * 100
    caller = Caller(make_app(), {"prompt": "a", "max_tokens": 100, "stream": True})
    await eventually(lambda: len(caller.messages) > 2)
    caller._is_gone = True
    await caller.ended()
    assert engine.num_open == 0


async def test_a_slow_reader_stalls_only_itself_and_is_aborted_when_it_leaves(make_app, engine, eventually):
    engine.reply = b"x" * 100
    app = make_app()
    slow = Caller(app, {"prompt": "a", "n": 2, "max_tokens": 100, "stream": True})
    slow.reads_until = 3
    await eventually(lambda: len(slow.messages) == 3)
    quick = Caller(app, {"prompt": "a", "max_tokens": 100, "stream": True})
    await quick.ended()
    assert quick.messages[-1]["body"].endswith(b"data: [DONE]\n\n")
    assert engine.num_open == 2
    slow.leave()
    await slow.ended()
    assert engine.num_open == 0


async def test_an_aborted_answer_is_counted_as_such(make_app, engine, eventually):
    engine.hold_after = 2
    app = make_app()
    caller = Caller(app, {"prompt": "a", "stream": True})
    await eventually(lambda: len(caller.messages) > 2)
    caller.leave()
    await caller.ended()
    text = app.state.server.metrics.exposition().decode()
    assert 'leyden:request_success_total{finished_reason="abort",model_name="tiny"} 1.0' in text


async def test_client_that_leaves_while_sending_its_body_harms_no_other(make_app, engine, caplog):
    caller = Caller(make_app(), {"prompt": "a"}, is_body_cut=True)
    caller.leave()
    await caller.ended()
    assert caller.messages == []
    assert engine.requests == []
    ours = [record for record in caplog.records if record.name.startswith("leyden")]
    assert all(record.levelname != "ERROR" for record in ours), "what asyncio finds of other tests does not count"


async def test_closing_a_real_connection_aborts_the_stream(make_live, engine, eventually):
    engine.hold_after = 2
    live = make_live()
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await asyncio.wait_for(reader.readuntil(b"data: "), GUARD_SECONDS)
    writer.close()
    await eventually(lambda: engine.num_aborted == 1)
    assert engine.num_open == 0
