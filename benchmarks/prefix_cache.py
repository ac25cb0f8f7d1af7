"""Measure what the prefix cache spares: chats that begin with one of a few system prompts, and pairs of prompts.

    python -P benchmarks/prefix_cache.py --model benchmarks/configs/dense --load-format dummy
    python -P benchmarks/prefix_cache.py --model benchmarks/configs/dense --load-format dummy --pairs 32

Conversations choose among `--systems` prompts by Zipf's law (the i-th most popular with weight i^-s) and have `--turns`
turns: each sends all there was before, and a new message. `--users` hold one at a time, one after another. The same
conversations run with the cache and without, the answers of the run before being read out so that both feed the same
tokens. Token ids are random, the engine is driven in this process, greedy.

Told for each: time from handing a request in to its first token, and which share of the tokens that an earlier request
or answer began with, too, was not computed again; beside it the share that would be left if hits were whole blocks of
512 or 1,024 tokens. The last line is one JSON object.

With `--pairs`, of two prompts of `--system-tokens` tokens the second parts from the first at a random place, where none
has parted before, one at a time, each for one token. Every pair is computed twice, with states kept on the way of a
prompt and without (`snapshot_interval` 0), by turns in one engine of the server's default budget. Told: which
share of the shared tokens the second found, the time to first token of both, and what the states cost the first, which
is the median over the pairs of the quotient of its two times.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from leyden.benchmarks.load.machine import hardware, software
from leyden.configs.sources import load_settings
from leyden.engine.core import EngineCore
from leyden.engine.messages import AddRequest
from leyden.engine.prefix.ladder import Ladder
from leyden.engine.prefix.radix_tree import common_prefix
from leyden.engine.sampling_params import SamplingParams

ALIGNMENTS = (512, 1024)
SHORTEST_SHARED = 512  # tokens that the prompts of a pair share at least


@dataclass
class Conversation:
    """What one user sends: the message of each turn, after all there was before, which at first is a system prompt."""

    messages: list[list[int]]
    prompt: list[int]
    params: SamplingParams
    beginning: int  # tokens of the system prompt
    turn: int = 0


@dataclass
class Turn:
    """One measured request."""

    number: int
    prompt: list[int]
    started: float
    seconds: float | None = None  # to its first token
    cached: int = 0
    shareable: int = 0
    answer: list[int] = field(default_factory=list)


def main() -> int:
    arguments = parse_arguments()
    report = run_pairs(arguments) if arguments.pairs else run_conversations(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))
    return 0


def run_pairs(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the second of two prompts finds of the first, with states on the way and without."""
    core = make_core(arguments, "true", length=arguments.system_tokens + 1, budget=2048)
    reuse, vocabulary = core.scheduler.reuse, range(core.runner.served.spec.vocab_size)
    ladders = {"on": reuse.ladder, "off": Ladder(reuse.cache.min_tokens, 0)}
    rng = random.Random(0)
    pairs: list[dict[str, Any]] = []
    for i in range(arguments.pairs + 1):  # the first compiles, and fills no figure
        shared = rng.randrange(SHORTEST_SHARED, arguments.system_tokens)
        first, other = (rng.choices(vocabulary, k=arguments.system_tokens) for _ in range(2))
        pair: dict[str, Any] = {"shared": shared}
        for name in ("on", "off") if i % 2 else ("off", "on"):
            reuse.ladder = ladders[name]
            reuse.cache.clear()
            times = [run_alone(core, first), run_alone(core, first[:shared] + other[shared:])]
            pair[name] = {"first_ms": times[0][0], "second_ms": times[1][0], "found": times[1][1]}
            pair[name]["states"] = reuse.cache.num_snapshots_used
        pairs.append(pair)
    del pairs[0]
    report = environment(arguments) | {"prompt_tokens": arguments.system_tokens, "pairs": pairs}
    report["runs"] = {name: summary_of_pairs(pairs, name) for name in ladders}
    report["prefill_cost"] = round(statistics.median(p["on"]["first_ms"] / p["off"]["first_ms"] for p in pairs) - 1, 4)
    for name, result in report["runs"].items():
        print(f"states on the way {name:3}: {result}")
    print(f"cost of the states to the first prompt: {report['prefill_cost']:.2%}")
    return report


def run_alone(core: EngineCore, prompt: list[int]) -> tuple[float, int]:
    """(milliseconds to the first token of a prompt that nothing runs beside, tokens that it found in the cache)."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    began = time.perf_counter()
    core.add_request(AddRequest(request_id="alone", prompt_token_ids=prompt, sampling_params=params))
    found = 0
    while core.has_work:
        for output in core.step():
            found = output.num_cached_tokens or found
    return round(1e3 * (time.perf_counter() - began), 3), found


def summary_of_pairs(pairs: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Of the pairs with states on the way, or without: medians, and the shares of the shared tokens that were found."""
    shares = [pair[name]["found"] / pair["shared"] for pair in pairs]
    return {
        "first_ms": round(statistics.median(pair[name]["first_ms"] for pair in pairs), 2),
        "second_ms": round(statistics.median(pair[name]["second_ms"] for pair in pairs), 2),
        "found_share": round(statistics.mean(shares), 4),
        "smallest_found_share": round(min(shares), 4),
        "states_per_pair": round(statistics.mean(pair[name]["states"] for pair in pairs), 1),
    }


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"model": str(arguments.model), "hardware": hardware(), "software": software()}


def run_conversations(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same conversations with the cache and without."""
    length = arguments.system_tokens + arguments.turns * (arguments.message_tokens + arguments.answer_tokens)
    runs = {}
    for name, is_on in (("on", "true"), ("off", "false")):
        core = make_core(arguments, is_on, length=length, budget=max(8192, arguments.users))
        run(core, make_conversations(arguments, core, seed=1)[:2], 2)  # compile, and fill no figure
        core.scheduler.cache.clear()
        runs[name] = run(core, make_conversations(arguments, core, seed=0), arguments.users)
        del core
        gc.collect()
    report = environment(arguments) | {
        "systems": arguments.systems,
        "system_tokens": arguments.system_tokens,
        "zipf": arguments.zipf,
        "users": arguments.users,
        "conversations": arguments.conversations,
        "turns": arguments.turns,
        "message_tokens": arguments.message_tokens,
        "answer_tokens": arguments.answer_tokens,
        "runs": {name: summary(turns, seconds) for name, (turns, seconds) in runs.items()},
    }
    show(report)
    return report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder, hub id or demo")
    parser.add_argument("--load-format", default="auto", help="dummy = random weights")
    parser.add_argument("--engine", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the engine")
    parser.add_argument("--systems", type=int, default=50, help="system prompts to choose from")
    parser.add_argument("--system-tokens", type=int, default=8192, help="tokens of each")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of their popularity")
    parser.add_argument("--users", type=int, default=8, help="conversations at a time")
    parser.add_argument("--conversations", type=int, default=100, help="in all")
    parser.add_argument("--turns", type=int, default=4, help="of each conversation")
    parser.add_argument("--message-tokens", type=int, default=64, help="tokens that a turn adds")
    parser.add_argument("--answer-tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--pairs", type=int, default=0, help="measure so many pairs of prompts instead")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    return parser.parse_args()


def make_core(arguments: argparse.Namespace, prefix_cache: str, *, length: int, budget: int) -> EngineCore:
    settings = {
        "model": arguments.model,
        "load_format": arguments.load_format,
        "max_num_seqs": str(arguments.users),
        "max_model_len": str(length),
        "max_num_batched_tokens": str(budget),
        "prefix_cache": prefix_cache,
    }
    core = EngineCore(load_settings(settings | dict(pair.split("=", 1) for pair in arguments.engine)).engine())
    gc.collect()
    gc.freeze()
    return core


def make_conversations(arguments: argparse.Namespace, core: EngineCore, seed: int) -> list[Conversation]:
    """The same for the same seed; prompts of two seeds share nothing."""
    rng = random.Random(seed)
    vocabulary = range(core.runner.served.spec.vocab_size)
    systems = [rng.choices(vocabulary, k=arguments.system_tokens) for _ in range(arguments.systems)]
    weights = [(i + 1) ** -arguments.zipf for i in range(arguments.systems)]
    params = SamplingParams(temperature=0.0, max_tokens=arguments.answer_tokens, ignore_eos=True)
    conversations = []
    for chosen in rng.choices(range(arguments.systems), weights, k=arguments.conversations):
        messages = [rng.choices(vocabulary, k=arguments.message_tokens) for _ in range(arguments.turns)]
        conversations.append(Conversation(messages, list(systems[chosen]), params, arguments.system_tokens))
    return conversations


def run(core: EngineCore, conversations: list[Conversation], users: int) -> tuple[list[Turn], float]:
    """All conversations, `users` of them at a time. Returns their turns and the seconds that all took."""
    waiting, open_, turns, seen = conversations[::-1], {}, [], []
    began = time.perf_counter()
    for _ in range(min(users, len(waiting))):
        start_turn(core, waiting.pop(), open_, turns)
    while core.has_work:
        for output in core.step():
            conversation, turn = open_[output.request_id]
            if turn.seconds is None and output.token_ids:
                turn.seconds = time.perf_counter() - turn.started
                turn.cached = output.num_cached_tokens or 0
            turn.answer += output.token_ids
            if output.finish_reason is None:
                continue
            del open_[output.request_id]
            conversation.prompt = turn.prompt + turn.answer
            if conversation.turn < len(conversation.messages):
                start_turn(core, conversation, open_, turns)
            elif waiting:
                start_turn(core, waiting.pop(), open_, turns)
    seconds = time.perf_counter() - began
    for turn in turns:
        prompt = np.array(turn.prompt, dtype=np.int32)
        known = max((common_prefix(other, prompt) for other in seen), default=0)
        turn.shareable = min(known, len(prompt) - 1)
        seen.append(np.array(turn.prompt + turn.answer, dtype=np.int32))
    return turns, seconds


def start_turn(
    core: EngineCore, conversation: Conversation, open_: dict[str, tuple[Conversation, Turn]], turns: list[Turn]
) -> None:
    prompt = conversation.prompt + conversation.messages[conversation.turn]
    conversation.turn += 1
    turn = Turn(conversation.turn, prompt, time.perf_counter())
    request_id = f"turn-{len(turns)}"
    turns.append(turn)
    open_[request_id] = (conversation, turn)
    request = AddRequest(request_id=request_id, prompt_token_ids=prompt, sampling_params=conversation.params)
    request.beginning = conversation.beginning if turn.number == 1 else 0  # as the server says of a first message
    core.add_request(request)


def summary(turns: list[Turn], seconds: float) -> dict[str, Any]:
    """Times by turn, and what was shared."""
    shareable = sum(turn.shareable for turn in turns)
    blocks = {str(n): sum(turn.shareable // n * n for turn in turns) / shareable for n in ALIGNMENTS}
    return {
        "seconds": round(seconds, 3),
        "first_token_ms": {
            f"turn {number}": {
                "median": round(1e3 * statistics.median(times), 2),
                "p99": round(1e3 * sorted(times)[int(0.99 * (len(times) - 1))], 2),
            }
            for number, times in by_turn(turns)
        },
        "shareable_tokens": shareable,
        "cached_tokens": sum(turn.cached for turn in turns),
        "cached_share": round(sum(turn.cached for turn in turns) / shareable, 4),
        "share_in_blocks_of": {size: round(share, 4) for size, share in blocks.items()},
    }


def by_turn(turns: list[Turn]) -> Iterator[tuple[int, list[float]]]:
    for number in sorted({turn.number for turn in turns}):
        yield number, [turn.seconds for turn in turns if turn.number == number and turn.seconds is not None]


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['model']} on {report['hardware']}: {report['conversations']} conversations")
    for name, result in report["runs"].items():
        times = "  ".join(f"{turn} {t['median']:.1f} ms" for turn, t in result["first_token_ms"].items())
        share = f"{result['cached_share']:.1%} of what was shared hit"
        print(f"cache {name:3}: {result['seconds']:.2f} s, median to first token: {times}; {share}")


if __name__ == "__main__":
    sys.exit(main())
