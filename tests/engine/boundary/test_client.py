"""The boundary to the engine, in a thread and in a process: streams, aborts, deaths, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
from engines import engine_config, request
from leyden.configs.schema import EngineConfig
from leyden.engine.async_llm import AsyncLLM
from leyden.engine.boundary.in_process import InProcessClient
from leyden.engine.boundary.process_client import ProcessClient
from leyden.engine.boundary.stream import Stream
from leyden.engine.core import EngineCore
from leyden.engine.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    StoppingError,
)
from leyden.engine.messages import EngineStats, StepOutputs
from leyden.engine.outputs import StepOutput
from tiny_models import greedy, random_prompt

PROMPT = random_prompt(20, seed=3)
DEADLINE = 20.0


async def eventually(claim) -> None:
    """Wait until `claim()` is true."""
    async with asyncio.timeout(DEADLINE):
        while not claim():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(autouse=True)
def short_folder(monkeypatch) -> Iterator[str]:
    """A temporary folder of this test's own, with a path that fits a socket's address."""
    with tempfile.TemporaryDirectory(prefix="test-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


def socket_folders() -> set[str]:
    return set(glob.glob(os.path.join(tempfile.gettempdir(), "leyden-*")))


@contextlib.asynccontextmanager
async def running(client):
    try:
        await client.start()
        yield client
    finally:
        await client.close()


async def collect(client, each) -> list[int]:
    tokens: list[int] = []
    async with asyncio.timeout(DEADLINE):
        async for output in client.generate(each):
            tokens += output.token_ids
    return tokens


async def use(client, tiny) -> None:
    """What every client must do, while it runs."""
    assert client.is_healthy and client.info.max_model_len == 1024
    expected = greedy(tiny.model, PROMPT, 12)
    assert await collect(client, request("a", PROMPT, max_tokens=12)) == expected
    together = [collect(client, request(f"t{i}", PROMPT, max_tokens=12)) for i in range(6)]
    assert await asyncio.gather(*together) == [expected] * 6

    for wrong, error in (
        (request("w", []), RequestError),
        (request("w", [10**6]), RequestError),
        (request("w", [1] * 1100), ContextLengthError),
        (request("w", [1], logit_bias={9999: 1.0}), RequestError),
    ):
        with pytest.raises(error):
            await collect(client, wrong)

    before = client.stats.generation_tokens_total
    async with aclosing(client.generate(request("closed early", [1], max_tokens=1000))) as stream:
        assert (await anext(stream)).token_ids
        with pytest.raises(RequestError, match="in use"):
            await collect(client, request("closed early", [1]))
    await eventually(lambda: client.stats.state_slots_used == client.stats.kv_blocks_used == 0)
    reader = asyncio.create_task(collect(client, request("cancelled", [1], max_tokens=1000)))
    await eventually(lambda: client.stats.num_running == 1)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await eventually(lambda: client.stats.state_slots_used == client.stats.kv_blocks_used == 0)
    assert client.stats.generation_tokens_total - before < 1000, "neither went on to its end"


async def test_in_process_client(tiny):
    async with running(InProcessClient(engine_config(tiny.folder, max_model_len=1024))) as client:
        await use(client, tiny)
    assert not client.is_healthy
    await client.close()
    with pytest.raises(EngineDeadError):
        await collect(client, request("late", [1]))


async def test_process_client_leaves_no_process_and_no_folder(tiny):
    before = socket_folders()
    async with running(ProcessClient(engine_config(tiny.folder, max_model_len=1024))) as client:
        [folder] = socket_folders() - before
        assert os.stat(folder).st_mode & 0o777 == 0o700, "nobody else may speak to the engine"
        await use(client, tiny)
        pid = client.pid
        open_stream = asyncio.create_task(collect(client, request("open", [1], max_tokens=1000)))
        await eventually(lambda: client.stats.num_running == 1)
    with pytest.raises(EngineDeadError):
        await open_stream
    assert not is_alive(pid) and socket_folders() <= before
    await client.close()
    with pytest.raises(EngineDeadError):
        await collect(client, request("late", [1]))


async def test_killed_process_fails_every_stream_and_turns_health_red(tiny):
    before = socket_folders()
    async with running(ProcessClient(engine_config(tiny.folder, max_model_len=1024))) as client:
        death = asyncio.create_task(client.wait_dead())
        streams = [
            asyncio.create_task(collect(client, request(f"r{i}", [1], max_tokens=1000, ignore_eos=True)))
            for i in range(6)
        ]
        await eventually(lambda: client.stats.num_running == 4)
        os.kill(client.pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE):
            results = await asyncio.gather(*streams, return_exceptions=True)
            assert "signal 9" in await death
        assert all(isinstance(result, EngineDeadError) for result in results), results
        assert not client.is_healthy
        with pytest.raises(EngineDeadError, match="signal 9"):
            await collect(client, request("late", [1]))
    assert socket_folders() <= before


@pytest.mark.parametrize("num_streams", [0, 3], ids=["idle", "busy"])
async def test_stopped_engine_is_dead_after_step_timeout_and_is_killed(tiny, num_streams):
    before = socket_folders()
    async with running(ProcessClient(engine_config(tiny.folder, max_model_len=1024), step_timeout=3)) as client:
        streams = [
            asyncio.create_task(collect(client, request(f"r{i}", [1], max_tokens=1000, ignore_eos=True)))
            for i in range(num_streams)
        ]
        await eventually(lambda: client.stats.num_running == num_streams)
        os.kill(client.pid, signal.SIGSTOP)
        async with asyncio.timeout(DEADLINE):
            assert "step_timeout" in await client.wait_dead()
            results = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results), results
        assert not client.is_healthy
        await eventually(lambda: not is_alive(client.pid))
    assert socket_folders() <= before


async def test_queue_bound_holds_while_the_engine_is_silent(tiny):
    """Only for a request whose start was not announced; a sibling starts with its leader."""
    async with running(ProcessClient(engine_config(tiny.folder, max_model_len=1024), step_timeout=60)) as client:
        started = request("started", [1], max_tokens=1000, ignore_eos=True)
        started.max_queue_seconds = 0.01
        stream = asyncio.create_task(collect(client, started))
        await eventually(lambda: client.stats.generation_tokens_total > 0)
        os.kill(client.pid, signal.SIGSTOP)
        sibling = request("sibling", [1], max_tokens=3, sibling_of="started")
        late = request("late", [1], max_tokens=3)
        sibling.max_queue_seconds = late.max_queue_seconds = 0.01
        following = asyncio.create_task(collect(client, sibling))
        with pytest.raises(QueueTimeoutError, match="max_queue_seconds"):
            await collect(client, late)
        assert not stream.done() and not following.done() and client.is_healthy
        os.kill(client.pid, signal.SIGCONT)
        for task in (stream, following):
            task.cancel()
        await asyncio.gather(stream, following, return_exceptions=True)
        await eventually(lambda: client.stats.num_running + client.stats.num_waiting == 0)


async def test_ctrl_c_does_not_reach_an_engine_that_still_imports(tiny, monkeypatch, tmp_path):
    seen, before = tmp_path / "blocked", signal.pthread_sigmask(signal.SIG_BLOCK, [])
    asks = f"import signal; open({str(seen)!r}, 'w').write(str(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    monkeypatch.setattr(ProcessClient, "ENGINE", ("-c", asks))
    client = ProcessClient(engine_config(tiny.folder))
    with pytest.raises(EngineDeadError):
        await client.start()
    await client.close()
    assert "SIGINT" in seen.read_text()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


async def test_an_engine_that_cannot_be_understood_is_dead(tiny, monkeypatch):
    """Another version, say: its first message is none of ours."""
    speaks = "import sys, zmq; s = zmq.Context().socket(zmq.PAIR); s.connect(sys.argv[1]); s.send(b'hello'); input()"
    monkeypatch.setattr(ProcessClient, "ENGINE", ("-c", speaks + "; sys.stdin.read(); import time; time.sleep(60)"))
    client = ProcessClient(engine_config(tiny.folder))
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(EngineDeadError, match="cannot be understood"):
            await client.start()
        await client.close()
    assert not is_alive(client.pid)


@pytest.mark.parametrize("kind", [InProcessClient, ProcessClient])
async def test_wrong_checkpoint_is_a_config_error_at_start(kind, tmp_path):
    before = socket_folders()
    client = kind(engine_config(tmp_path))
    with pytest.raises(ConfigError, match=r"config\.json"):
        async with asyncio.timeout(DEADLINE):
            await client.start()
    assert not client.is_healthy and socket_folders() <= before
    await client.close()


async def test_full_queue_is_an_error_before_the_first_output(tiny):
    async with running(
        InProcessClient(engine_config(tiny.folder, max_model_len=1024, max_num_seqs=1, max_waiting=1))
    ) as client:
        streams = [client.generate(request(f"r{i}", [1], max_tokens=1000, ignore_eos=True)) for i in range(2)]
        readers = [asyncio.create_task(anext(stream)) for stream in streams]
        await eventually(lambda: client.stats.num_running == 1)
        with pytest.raises(QueueFullError):
            await collect(client, request("one too many", [1]))
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        await eventually(lambda: client.stats.num_running + client.stats.num_waiting == 0)
        assert len(await collect(client, request("room again", [1], max_tokens=3))) == 3


async def test_engine_that_fails_in_a_step_fails_every_stream(tiny, monkeypatch):
    async with running(InProcessClient(engine_config(tiny.folder, max_model_len=1024))) as client:
        death = asyncio.create_task(client.wait_dead())

        def explode(self, tell_started):
            raise ZeroDivisionError("a bug")

        streams = [asyncio.create_task(collect(client, request(f"r{i}", [1], max_tokens=1000))) for i in range(3)]
        await eventually(lambda: client.stats.num_running == 3)
        monkeypatch.setattr(EngineCore, "step", explode)
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(r, EngineDeadError) and "a bug" in str(r) for r in results)
        assert "ZeroDivisionError" in await death and not client.is_healthy


async def test_ended_streams_are_aborted_and_late_ones_refused(tiny):
    async with running(InProcessClient(engine_config(tiny.folder, max_model_len=1024))) as client:
        stream = asyncio.create_task(collect(client, request("open", [1], max_tokens=1000, ignore_eos=True)))
        await eventually(lambda: client.stats.num_running == 1)
        client.end_streams("time is over")
        with pytest.raises(StoppingError, match="time is over"):
            await stream
        await eventually(lambda: client.stats.num_running == 0)
        with pytest.raises(StoppingError, match="time is over"):
            await collect(client, request("late", [1]))
        assert client.is_healthy


async def test_closing_while_streams_are_open_ends_them(tiny):
    async with running(InProcessClient(engine_config(tiny.folder, max_model_len=1024))) as client:
        stream = asyncio.create_task(collect(client, request("open", [1], max_tokens=1000)))
        await eventually(lambda: client.stats.num_running == 1)
    with pytest.raises(EngineDeadError):
        await stream


async def test_second_close_returns_when_the_first_is_done():
    """It used to return at once. A server whose tokenizer was broken then left before its engine's folder was gone."""
    gate, stopped = asyncio.Event(), []

    class Slow(InProcessClient):
        async def _stop(self) -> None:
            await gate.wait()
            stopped.append(True)

    client = Slow(EngineConfig())
    closing = [asyncio.create_task(client.close()) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(task.done() for task in closing)
    gate.set()
    await asyncio.gather(*closing)
    assert stopped == [True]


async def test_close_after_a_close_that_was_cancelled_stops_the_engine():
    stops = []

    class Slow(InProcessClient):
        async def _stop(self) -> None:
            stops.append("begun")
            await asyncio.sleep(0)
            stops.append("done")

    client = Slow(EngineConfig())
    first = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await client.close()
    assert stops == ["begun", "begun", "done"]


async def test_heartbeat_of_a_dead_engine_is_not_watched():
    client = ProcessClient(EngineConfig(), step_timeout=0.01)
    client._death = asyncio.get_running_loop().create_future()
    client._death.set_result("killed")
    await asyncio.wait_for(client._watch_heartbeat(), DEADLINE)  # and no attempt to kill its process


@pytest.mark.parametrize(("kind", "delay"), [(InProcessClient, 0), (ProcessClient, 0), (ProcessClient, 0.3)])
async def test_start_that_is_cancelled_leaves_nothing_and_nothing_complains(tiny, kind, delay):
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    before = socket_folders()
    client = kind(engine_config(tiny.folder))
    start = asyncio.create_task(client.start())
    await asyncio.sleep(0)  # begun, and nothing more
    await asyncio.sleep(delay)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    assert start.cancelled()
    await asyncio.sleep(0.05)
    assert complaints == [] and socket_folders() <= before
    assert not hasattr(client, "_process") or not is_alive(client.pid)


async def test_text_over_a_client_stops_at_a_stop_string_and_frees_the_engine(tiny, tokenizer):
    async with running(InProcessClient(engine_config(tiny.folder, max_model_len=1024))) as client:
        llm = AsyncLLM(client, tokenizer)
        asked = {"max_tokens": 200, "logit_bias": dict.fromkeys(range(256, 320), -100.0)}
        whole = "".join([output.text async for output in llm.generate(request("a", PROMPT, **asked))])
        stop = whole[30:33]
        outputs = [output async for output in llm.generate(request("b", PROMPT, stop=(stop,), **asked))]
        assert "".join(output.text for output in outputs) == whole[: whole.index(stop)]
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
        assert outputs[-1].num_prompt_tokens == len(PROMPT)
        await eventually(lambda: client.stats.state_slots_used == 0)


def test_engine_whose_parent_died_before_it_looked_leaves_too(short_folder):
    folder = Path(short_folder, "own")
    folder.mkdir()
    arguments = [f"ipc://{folder}/engine.sock", str(os.getppid()), "info", "text"]
    command = [sys.executable, "-P", "-m", "leyden.engine.boundary.process", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as engine:
        assert engine.wait(timeout=DEADLINE) == 1
        assert "the server is gone" in engine.stderr.read() and not folder.exists()


async def test_folder_of_the_socket_is_closed_to_other_users(tiny):
    async with running(ProcessClient(engine_config(tiny.folder, max_model_len=1024))) as client:
        assert os.stat(client._folder).st_mode & 0o777 == 0o700
        assert os.listdir(client._folder) == ["engine.sock"]


async def test_a_wait_that_was_too_long_is_an_error_of_its_own(tiny):
    async with running(InProcessClient(engine_config(tiny.folder, max_num_seqs=1, max_model_len=1024))) as client:
        first = asyncio.create_task(collect(client, request("first", [1], max_tokens=900)))
        await eventually(lambda: client.stats.num_running == 1)
        second = request("second", [1])
        second.max_queue_seconds = 0.01
        with pytest.raises(QueueTimeoutError, match="max_queue_seconds"):
            await collect(client, second)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_outputs_that_pile_up_are_one_and_failures_come_after_them():
    stream = Stream()
    waiting = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    stream.put(StepOutput(request_id="r", token_ids=[1]))
    assert (await waiting).token_ids == [1], "the first one goes at once"
    for token in range(2, 100):
        stream.put(StepOutput(request_id="r", token_ids=[token]))
    stream.put(StepOutput(request_id="r", finish_reason="error", error="NaN"))
    stream.fail(EngineDeadError("dead"))
    assert (await stream.get()).token_ids == list(range(2, 100))
    assert (await stream.get()).error == "NaN"
    with pytest.raises(EngineDeadError):
        await stream.get()


@pytest.mark.parametrize(("num_outputs", "most_per_turn"), [(0, ProcessClient.READS_PER_TURN), (20_000, 1)])
async def test_an_engine_faster_than_its_reader_leaves_streams_their_turn(num_outputs, most_per_turn):
    class EndlessSocket:
        """A message is always there, so that receiving never waits."""

        num_reads = 0

        async def recv(self) -> bytes:
            self.num_reads += 1
            assert self.num_reads < 1000, "nobody else got a turn"
            return message

    outputs = [StepOutput(request_id="somebody's")] * num_outputs
    message = msgspec.msgpack.encode(StepOutputs(outputs=outputs, stats=EngineStats()))
    client = ProcessClient(EngineConfig())
    client._socket = EndlessSocket()
    reading = asyncio.create_task(client._read())
    for _ in range(5):
        await asyncio.sleep(0)
    assert 1 < client._socket.num_reads <= 5 * most_per_turn
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert reading.cancelled()


async def test_no_place_for_the_socket_is_a_wrong_setting(tiny, short_folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", os.path.join(short_folder, "missing"))
    client = ProcessClient(engine_config(tiny.folder))
    with pytest.raises(ConfigError, match="TMPDIR"):
        await client.start()


PARENT = '''
import asyncio, sys
from leyden.configs.schema import EngineConfig
from leyden.engine.boundary.process_client import ProcessClient
from leyden.engine.boundary.stream import Stream

SLOW = """
import sys, time
from leyden.engine import core
from leyden.engine.boundary import process
core.EngineCore = lambda *_, **__: time.sleep(600)
sys.exit(process.main())
"""

async def main():
    client = ProcessClient(EngineConfig.model_validate_json(sys.argv[1]))
    if "while it loads" in sys.argv:
        ProcessClient.ENGINE = ("-P", "-c", SLOW)
        loading = asyncio.create_task(client.start())
        await asyncio.sleep(3)
    else:
        await client.start()
    print(client.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
'''


@pytest.mark.parametrize("when", ["once it is ready", "while it loads"])
def test_engine_ends_when_its_parent_is_killed(tiny, tmp_path, short_folder, when):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    arguments = [sys.executable, str(script), engine_config(tiny.folder, max_model_len=1024).model_dump_json(), when]
    env = os.environ | {"TMPDIR": short_folder}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=env, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + DEADLINE
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid), "the engine outlives its server"
    assert not os.listdir(short_folder), "a killed server cannot remove its folder: its engine does"
