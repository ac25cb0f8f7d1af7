"""Measure whether the engine listens, and is fair, while it computes a long prompt.

    python -P benchmarks/responsiveness.py --tokens 131072
    python -P benchmarks/responsiveness.py --small --tokens 4000 --short-after 0.02 --device cpu

A model with random weights of the config's shapes computes a prompt of so many random tokens at default settings.
Meanwhile a thread sends a prompt of 16 tokens, and when that has its first token, an abort of the long one. Counted are
the steps that were launched and not complete at any time, the chunks of the long prompt that were launched between the
short prompt's arrival and its first token, and the steps that were launched between the abort's arrival and the moment
from which no step computes the long prompt. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from leyden.benchmarks.long_context import argument_parser, write_config
from leyden.configs.schema import EngineConfig
from leyden.engine.boundary.loop import run_loop
from leyden.engine.core import EngineCore
from leyden.engine.execution.launcher import LaunchedStep
from leyden.engine.messages import AbortRequest, AddRequest, FromEngine, Shutdown, StepOutputs, ToEngine
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.scheduling.step import ScheduledBatch

SHORT_TOKENS = 16


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="leyden-") as folder:
        write_config(arguments, Path(folder), arguments.tokens + SHORT_TOKENS)
        config = EngineConfig(
            model=folder, load_format="dummy", device=arguments.device, max_model_len=arguments.tokens + SHORT_TOKENS
        )
        core = EngineCore(config, progress=False)
    run(core, {"warm-up": prompt_of(core, 3000)})
    report = Watch(core, arguments).measure()
    print(json.dumps(report))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=131_072, help="length of the long prompt")
    parser.add_argument(
        "--short-after", type=float, default=0.065, help="seconds from the long prompt to the short one"
    )
    return parser.parse_args()


def prompt_of(core: EngineCore, length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(core.runner.served.spec.vocab_size) for _ in range(min(length, core.max_model_len - 2))]


def asked(name: str, prompt: list[int]) -> AddRequest:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    return AddRequest(request_id=name, prompt_token_ids=prompt, sampling_params=params)


def run(core: EngineCore, prompts: dict[str, list[int]]) -> None:
    """What is compiled or allocated at first is no part of the figures."""
    for name, prompt in prompts.items():
        core.add_request(asked(name, prompt))
    while core.has_work:
        core.step()


class Watch:
    """One run: the requests by their times, and the engine's steps meanwhile."""

    def __init__(self, core: EngineCore, arguments: argparse.Namespace) -> None:
        self.core = core
        self.arguments = arguments
        self.steps: list[list[str]] = []  # requests of each launched step
        self.most_ahead = 0
        self.sent: dict[str, tuple[float, int]] = {}  # by message: when, after how many launched steps
        self.first_token: dict[str, tuple[float, int]] = {}  # by request, likewise
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._events: list[torch.cuda.Event] = []  # of steps that were not complete when last asked
        self._launch = core.launcher.launch
        core.launcher.launch = self.launch  # type: ignore[method-assign]

    def measure(self) -> dict[str, Any]:
        long, short = (prompt_of(self.core, size) for size in (self.arguments.tokens, SHORT_TOKENS))
        self.send("long", asked("long", long))
        timer = threading.Timer(self.arguments.short_after, self.send, ("short", asked("short", short)))
        timer.start()
        run_loop(self.core, self.receive, self.note)
        timer.join()
        return self.report()

    def send(self, name: str, message: ToEngine) -> None:
        self.sent[name] = (time.perf_counter(), len(self.steps))
        self._inbox.put(message)

    def receive(self, wait: bool) -> list[ToEngine]:
        if wait and len(self.sent) == 3 and self._inbox.empty():
            return [Shutdown()]
        messages = [self._inbox.get()] if wait else []
        while not self._inbox.empty():
            messages.append(self._inbox.get())
        return messages

    def note(self, message: FromEngine) -> None:
        if not isinstance(message, StepOutputs):
            return
        for output in message.outputs:
            if output.error is not None:
                sys.exit(f"{output.request_id}: {output.error}")
            if output.token_ids and output.request_id not in self.first_token:
                self.first_token[output.request_id] = (time.perf_counter(), len(self.steps))
                if output.request_id == "short":
                    threading.Timer(0.005, self.send, ("abort", AbortRequest("long"))).start()

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        step = self._launch(batch)
        self.steps.append([sequence.request_id for sequence in batch.sequences])
        if self.core.runner.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._events = [*(event for event in self._events if not event.query()), event]
            self.most_ahead = max(self.most_ahead, len(self._events))
        return step

    def report(self) -> dict[str, Any]:
        (sent_at, sent_after), (token_at, token_after) = self.sent["short"], self.first_token["short"]
        after_abort = self.steps[self.sent["abort"][1] :]
        last = max((i + 1 for i, names in enumerate(after_abort) if "long" in names), default=0)
        return {
            "device": self.core.info.device_name,
            "tokens": self.arguments.tokens,
            "max_num_batched_tokens": self.core.config.max_num_batched_tokens,
            "most_steps_launched_and_not_complete": self.most_ahead,
            "steps_before_the_short_prompt": sent_after,
            "short_first_token_s": round(token_at - sent_at, 4),
            "long_chunks_before_it": sum("long" in names for names in self.steps[sent_after:token_after]),
            "steps_of_the_long_prompt_after_its_abort": last,
            "long_was_complete": "long" in self.first_token,
        }


if __name__ == "__main__":
    sys.exit(main())
