"""Processes that share a load: each has its part of the streams or arrivals, and all start at the same moment.

A worker receives a `Share`, renders its requests, sends "ready", receives the start time, and sends a `Result`. All
processes read the same clock (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from ...engine.startup.cores import num_cores
from .client import Client, Sample, run_closed, run_open
from .errors import BenchError
from .load import Load, Request, Workload, poisson_arrivals
from .target import Target

MAX_WORKERS = 8
STREAMS_PER_WORKER = 16
HEAD_START_SECONDS = 0.05  # between the last "ready" and the start, for the message to reach everyone


@dataclass(frozen=True)
class Share:
    """One worker's part of a load: every `num_workers`-th stream or arrival from `rank` on, with its requests. A share
    that `is_endless` runs until "stop", which cancels the requests under way."""

    target: Target
    workload: Workload
    load: Load
    timeout: float
    rank: int = 0
    num_workers: int = 1
    is_endless: bool = False

    def requests(self) -> Iterator[Request]:
        lanes = self.load.concurrency or self.num_workers  # a request belongs to a stream, a stream to a worker
        mine = (i for i in range(self.load.num_requests) if i % lanes % self.num_workers == self.rank)
        return (self.workload.request(index) for index in mine)

    def arrivals(self) -> Iterator[float]:
        """This worker's part of the arrivals that all workers know."""
        assert self.load.rate is not None
        every = poisson_arrivals(self.load.rate, f"{self.workload.seed}/{self.workload.name}")
        return islice(every, self.rank, None, self.num_workers)

    @property
    def streams(self) -> int:
        assert self.load.concurrency is not None
        return len(range(self.rank, self.load.concurrency, self.num_workers))


@dataclass
class Result:
    """The samples of a share. `cpu_share`: the part of its wall time in which the worker's process was busy."""

    start: float
    samples: list[Sample] = field(default_factory=list)
    cpu_share: float = 0.0


async def run_share(share: Share, requests: list[tuple[Request, bytes]], client: Client, start: float) -> list[Sample]:
    """Run a share that has an end."""
    await asyncio.sleep(max(0.0, start - time.perf_counter()))
    if share.load.concurrency is not None:
        return await run_closed(client, requests, share.streams)
    samples: list[Sample] = []
    timed = ((at, *request) for at, request in zip(share.arrivals(), requests, strict=False))
    await run_open(client, timed, start, samples)
    return samples


async def run_until_told(share: Share, client: Client, start: float, pipe: Connection) -> list[Sample]:
    """Run an endless share until a message arrives in the pipe."""
    samples: list[Sample] = []
    made = (share.workload.request(index) for index in range(share.load.num_requests))
    timed = ((at, request, client.write(request)) for at, request in zip(share.arrivals(), made, strict=False))
    told = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), told.set)
    running = asyncio.create_task(run_open(client, timed, start, samples))
    waiting = asyncio.create_task(told.wait())
    await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
    asyncio.get_running_loop().remove_reader(pipe.fileno())
    for task in (running, waiting):  # one of them is left
        task.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    if not running.cancelled():
        running.result()  # it ended by itself: raises what ended it
    return samples


def work(pipe: Connection) -> None:
    """The main function of a worker: it runs the shares that arrive in the pipe, until None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    while (share := pipe.recv()) is not None:
        workload = share.workload
        client = Client(share.target, workload.endpoint, ignore_eos=workload.ignore_eos, timeout=share.timeout)
        requests = [] if share.is_endless else [(request, client.write(request)) for request in share.requests()]
        gc.collect()
        gc.disable()  # a collection would look like a stall of the server
        pipe.send("ready")
        start = pipe.recv()
        busy = time.process_time()
        if share.is_endless:
            samples = asyncio.run(run_until_told(share, client, start, pipe))
            pipe.recv()
        else:
            samples = asyncio.run(run_share(share, requests, client, start))
        elapsed = max(time.perf_counter() - start, 1e-9)
        gc.enable()
        pipe.send(Result(start, samples, (time.process_time() - busy) / elapsed))


class Workers:
    """Worker processes, with one more for a background load."""

    def __init__(self, num_workers: int, *, has_background: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []
        for _ in range(num_workers + has_background):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
        self.num_workers = num_workers

    def run(self, share: Share, background: Share | None = None) -> tuple[list[Result], Result | None]:
        """Run a share on all workers, and `background` beside it. Returns the results of both.

        Raises `BenchError` when a worker dies.
        """
        try:
            return self._run(share, background)
        except (EOFError, OSError):
            raise BenchError("a worker process died; its message is above") from None

    def _run(self, share: Share, background: Share | None) -> tuple[list[Result], Result | None]:
        num_workers = min(self.num_workers, share.load.concurrency or self.num_workers)
        front, behind = self._pipes[:num_workers], self._pipes[self.num_workers :] if background is not None else []
        for rank, pipe in enumerate(front):
            pipe.send(replace(share, rank=rank, num_workers=num_workers))
        for pipe in behind:
            pipe.send(background)
        for pipe in front + behind:
            pipe.recv()
        start = time.perf_counter() + HEAD_START_SECONDS
        for pipe in front + behind:
            pipe.send(start)
        results = [pipe.recv() for pipe in front]
        for pipe in behind:
            pipe.send("stop")
        return results, next((pipe.recv() for pipe in behind), None)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def default_workers(load: float) -> int:
    """Workers for a load: one for each 16 streams (or requests per second), at most 8 and the cores but two."""
    return max(1, min(MAX_WORKERS, num_cores() - 2, int(load // STREAMS_PER_WORKER)))
