"""Everything that clients and machines do to a server, at once and at random, against the embedded model.

    python -P tests/chaos.py --minutes 10

Ordinary clients keep asking, whose answers are checked, while others flood, leave, read nothing, send nonsense, send
nothing, and somebody kills the engine. Prints a report; exits 1 when a law was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx

LIMITS = ["--max-num-seqs", "8", "--max-waiting", "16", "--max-connections", "48", "--max-queue-seconds", "20"]
TIMES = ["--read-timeout", "2", "--write-timeout", "2", "--idle-timeout", "2", "--max-num-batched-tokens", "512"]
GUARD_SECONDS = 60.0  # an answer that takes longer hangs
DOWN_SECONDS = 10.0  # from an engine's death to the server's
ASKED = ["Once upon a time", "The fox", "What is a river?", "A very small cat", "Rain", "One day the moon"]
HELD_UP_SECONDS = 0.5  # a client that comes so late to its own sockets may find them closed, half of `GRACE_SECONDS`
KILL_SHARE = 0.2  # of a run's time lies between two kills, so that a run of any length has some
STATUSES = (200, 429, 503)
NONSENSE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"prompt": "a", "n": 9223372036854775808}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": [[]]}',
    b'{"prompt": "a", "stop": ' + json.dumps(["x" * 300] * 50).encode() + b"}",
    b'{"prompt": "a", "logit_bias": {"99999999": 1}}',
    b'{"prompt": "a", "max_tokens": 2147483647}',
    b'{"prompt": ' + json.dumps("aaaa " * 300_000).encode() + b"}",
    b'{"prompt": "a", "guided_regex": "(a+)+$"}',
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template": "{% for i in range(9**9) %}{% endfor %}"}',
    b"x" * 3_000_000,
]


@dataclass
class Report:
    """What happened, and what should not have."""

    events: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    worst_health_seconds: float = 0.0  # as this process saw it, which has its own hands full

    def law(self, holds: bool, message: str) -> None:
        if not holds:
            self.broken.append(message)

    def __str__(self) -> str:
        lines = [f"  {count:>7,} {name}" for name, count in sorted(self.events.items())]
        laws = [f"  BROKEN  {message}" for message in self.broken[:20]] or ["  no law was broken"]
        health = f"  {self.worst_health_seconds:>7.2f} seconds was the longest wait for /health"
        return "\n".join(["what happened:", *lines, health, "laws:", *laws])


def is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


class Server:
    """A server process that is started again when it has ended."""

    def __init__(self) -> None:
        self.url = ""
        self.is_up = asyncio.Event()

    async def start(self) -> None:
        command = [
            sys.executable,
            "-P",
            "-m",
            "leyden.server.commands.cli",
            "serve",
            "demo",
            "--port",
            "0",
            *LIMITS,
            *TIMES,
        ]
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=env
        )
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if found := re.match(r"\s+address\s+(\S+)", line.decode()):
                self.url = found[1]
                break
        else:
            raise RuntimeError(f"the server did not start: code {await self.process.wait()}")
        self.is_up.set()

    @property
    def engine_pid(self) -> int:
        pid = self.process.pid
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return int(file.read().split()[0])

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


class Chaos:
    """All that goes on, until `stop_at`."""

    def __init__(self, seconds: float, seed: int) -> None:
        self.rng = random.Random(seed)
        self.report = Report()
        self.server = Server()
        self.seconds = seconds
        # One client, whose making is dear, and a socket for each request.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(timeout=GUARD_SECONDS, limits=limits)
        self.expected: dict[str, str] = {}
        self.held_up_at = -1.0  # when this process last came late to its own sockets
        self.epoch = 0  # how often the server was started: what spans a restart proves nothing

    async def run(self) -> Report:
        await self.server.start()
        try:
            self.expected = {prompt: (await self.complete(prompt))[1] for prompt in ASKED}
            self.stop_at = time.monotonic() + self.seconds
            actors = [self.ordinary] * 4 + [self.leaver] * 6 + [self.slow_reader] * 2
            actors += [self.babbler, self.slow_sender, self.flooder, self.health_watcher, self.killer]
            watching = asyncio.create_task(self._watch_own_delays())
            await asyncio.gather(*[self._repeat(actor) for actor in actors])
            watching.cancel()
            await self.settle()
        finally:
            await self.http.aclose()
            if self.server.process.returncode is None:
                self.server.process.kill()
        return self.report

    async def _watch_own_delays(self) -> None:
        """The server hangs up on who connects and does not ask: on a busy machine that may be us."""
        while True:
            slept = time.monotonic()
            await asyncio.sleep(0.05)
            if time.monotonic() - slept > HELD_UP_SECONDS:
                self.held_up_at = time.monotonic()

    async def _repeat(self, act: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < self.stop_at:
            await asyncio.wait_for(self.server.is_up.wait(), GUARD_SECONDS)
            epoch, began = self.epoch, time.monotonic()
            try:
                async with asyncio.timeout(GUARD_SECONDS):
                    await act()
            except TimeoutError:
                self.report.law(False, f"{act.__name__} hangs")
            except (httpx.TransportError, OSError, asyncio.IncompleteReadError) as error:
                await asyncio.sleep(0.1)  # for the watch to see that we are late
                is_down = epoch != self.epoch or not self.server.is_up.is_set()
                is_late = self.held_up_at >= began
                self.report.law(is_down or is_late, f"{act.__name__}: {type(error).__name__} {error}")
                why = "with the server" if is_down else "while this process was held up"
                self.report.events[f"connections lost {why}"] += 1
            await asyncio.sleep(self.rng.random() * 0.1)

    async def complete(self, prompt: str, **fields: object) -> tuple[int, str]:
        """(status, text) of a greedy answer."""
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0} | fields
        response = await self.http.post(f"{self.server.url}/v1/completions", json=body)
        self.report.events[f"answers with status {response.status_code}"] += 1
        if response.status_code != 200:
            self._check_error(response)
            return response.status_code, ""
        return 200, response.json()["choices"][0]["text"]

    def _check_error(self, response: httpx.Response) -> None:
        error = response.json().get("error", {})
        self.report.law(set(error) == {"message", "type", "param", "code"}, f"no envelope: {response.text[:200]}")
        if response.status_code in (429, 503):
            self.report.law("retry-after" in response.headers, f"{response.status_code} without Retry-After")

    async def ordinary(self) -> None:
        """The same question has the same answer, whoever else is there."""
        prompt = self.rng.choice(ASKED)
        epoch = self.epoch
        status, text = await self.complete(prompt)
        is_dying = status == 500 and (epoch != self.epoch or not self.server.is_up.is_set())
        self.report.law(status in STATUSES or is_dying, f"an ordinary request got {status}")
        if status == 200:
            self.report.law(text == self.expected[prompt], f"{prompt!r} was continued otherwise: {text!r}")

    async def leaver(self) -> None:
        """Asks for a lot and leaves in the middle of it, or before it begins."""
        stream = self.rng.random() < 0.7
        body = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": stream, "n": self.rng.randint(1, 3)}
        patience = httpx.Timeout(5, read=self.rng.choice([0.05, 0.3, 1.0]))
        with contextlib.suppress(httpx.TimeoutException):
            url = f"{self.server.url}/v1/completions"
            async with self.http.stream("POST", url, json=body, timeout=patience) as response:
                async for _ in response.aiter_raw():
                    if self.rng.random() < 0.1:
                        break
        self.report.events["clients that left"] += 1

    async def slow_reader(self) -> None:
        """Asks for more than the sockets hold, and reads nothing of it until it is hung up on."""
        body = {"prompt": "x", "max_tokens": 1900, "ignore_eos": True, "stream": True, "n": 4, "logprobs": 20}
        _, writer = await self._send(body)
        writer.transport.pause_reading()
        await asyncio.sleep(self.rng.choice([1, 4]))
        writer.transport.abort()
        self.report.events["readers that did not read"] += 1

    async def babbler(self) -> None:
        """Sends what is no request."""
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            raw, headers = self.rng.choice(NONSENSE), {"content-type": "application/json"}
            response = await self.http.post(f"{self.server.url}{path}", content=raw, headers=headers)
            self.report.events[f"nonsense with status {response.status_code}"] += 1
            if path != "/tokenize" or response.status_code != 200:
                self._check_error(response)
                self.report.law(400 <= response.status_code < 500 or response.status_code == 503, response.text)

    async def slow_sender(self) -> None:
        """Never finishes its head or its body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(self.rng.choice([b"POST", head, head + b"Content-Length: 100\r\n\r\n{"]))
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
        self.report.events["senders that were cut"] += 1

    async def flooder(self) -> None:
        """More at once than there is room for."""
        answers = await asyncio.gather(*[self.complete("x", max_tokens=4) for _ in range(150)])
        wrong = [status for status, _ in answers if status not in (*STATUSES, 500)]
        self.report.law(not wrong, f"a flood got {wrong}")
        self.report.events["floods"] += 1
        await asyncio.sleep(1)

    async def health_watcher(self) -> None:
        asked = time.monotonic()
        status = (await self.http.get(f"{self.server.url}/health")).status_code
        self.report.worst_health_seconds = max(self.report.worst_health_seconds, time.monotonic() - asked)
        self.report.law(status in (200, 503), f"/health answers {status}")
        self.report.events[f"health {status}"] += 1

    async def killer(self) -> None:
        """The engine dies, the server says so to everybody and ends with code 1, and is started again."""
        pause = min(GUARD_SECONDS / 3, max(4.0, KILL_SHARE * self.seconds))
        await asyncio.sleep(pause * (0.5 + self.rng.random()))
        self.server.is_up.clear()
        os.kill(self.server.engine_pid, signal.SIGKILL)
        try:
            code = await asyncio.wait_for(self.server.process.wait(), DOWN_SECONDS)
            self.report.law(code == 1, f"the server ended with code {code} after its engine died")
        except TimeoutError:
            self.report.law(False, "the server outlives its engine")
            self.server.process.kill()
            await self.server.process.wait()
        self.server.is_up.clear()
        self.epoch += 1
        await self.server.start()
        self.report.events["engines killed"] += 1

    async def _send(self, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        raw = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        writer.write(f"{head}{len(raw)}\r\n\r\n".encode() + raw)
        return reader, writer

    async def settle(self) -> None:
        """When all have left, everything is free again, and the server goes in peace."""
        deadline = time.monotonic() + 20
        names = ("state_slots_used", "kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
        held = {"": 1.0}
        while any(held.values()) and time.monotonic() < deadline:
            text = (await self.http.get(f"{self.server.url}/metrics")).text
            held = {name: float(re.findall(rf"^leyden:{name}\{{.*\}} (\S+)$", text, re.M)[0]) for name in names}
            await asyncio.sleep(0.1)
        self.report.law(not any(held.values()), f"not given back: {held}")
        for prompt, text in self.expected.items():
            self.report.law((await self.complete(prompt))[1] == text, f"{prompt!r} is continued otherwise afterwards")
        engine = self.server.engine_pid
        self.server.process.send_signal(signal.SIGTERM)
        try:
            code = await asyncio.wait_for(self.server.process.wait(), 30)
            self.report.law(code == 0, f"the server ended with code {code} after SIGTERM")
        except TimeoutError:
            self.report.law(False, "the server does not end")
        self.report.law(not is_alive(engine), "the engine outlives its server")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = asyncio.run(Chaos(arguments.minutes * 60, arguments.seed).run())
    print(report)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
