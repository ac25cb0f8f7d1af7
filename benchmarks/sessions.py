"""Measure how fast a conversation is saved and restored, beside computing it again.

    python -P benchmarks/sessions.py --tokens 100000
    python -P benchmarks/sessions.py --small --tokens 2000 --device cpu

A model with random weights of the config's shapes computes a prompt of so many random tokens and saves the session. A
second engine restores it, first with the file out of the page cache, as far as the system lets it go, then from there;
before each round its prefix cache is emptied. Seconds are the engine's, from the call until the state is in its place.
Then both engines answer the same next turn, for which the second computes the new tokens alone. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from leyden.benchmarks.long_context import argument_parser, write_config
from leyden.configs.schema import EngineConfig
from leyden.engine.core import EngineCore
from leyden.engine.messages import AddRequest, SessionAction, SessionCall, SessionDone
from leyden.engine.sampling_params import SamplingParams

ANSWER_TOKENS = 8
TURN_TOKENS = 16
ID = "measured"


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="leyden-", dir=arguments.folder) as folder:
        model = Path(folder) / "model"
        model.mkdir()
        write_config(arguments, model, context(arguments))
        report = measure(arguments, model, Path(folder) / "sessions")
    print(json.dumps(report))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the conversation")
    parser.add_argument("--rounds", type=int, default=3, help="times to restore from the page cache")
    parser.add_argument("--folder", type=Path, default=None, help="where the session's file is put for a while")
    return parser.parse_args()


def context(arguments: argparse.Namespace) -> int:
    return int(arguments.tokens) + TURN_TOKENS + 2 * ANSWER_TOKENS


def measure(arguments: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """Compute, save, start again, restore."""
    core = start(arguments, model, folder)
    rng = random.Random(0)
    vocab = core.runner.served.spec.vocab_size
    prompt = [rng.randrange(vocab) for _ in range(arguments.tokens)]
    turn = [rng.randrange(vocab) for _ in range(TURN_TOKENS)]
    first, computed_s = answer(core, prompt)
    saved = call(core, "save")
    print(f"{arguments.tokens} tokens computed in {computed_s:.2f} s")
    print(f"{saved.num_bytes / 1e9:.3f} GB saved in {saved.seconds:.3f} s")
    expected, _ = answer(core, prompt + first + turn)
    device = core.info.device_name
    del core
    gc.collect()  # its pools, before the next engine allocates
    core = start(arguments, model, folder)
    let_go(folder / f"{ID}.safetensors")
    rounds = [restore(core) for _ in range(1 + arguments.rounds)]
    before = core.stats().prefix_cache_hits_total
    again, turn_s = answer(core, prompt + first + turn)
    return {
        "device": device,
        "tokens": arguments.tokens,
        "gb": round(saved.num_bytes / 1e9, 4),
        "compute_s": round(computed_s, 3),
        "save_s": round(saved.seconds, 3),
        "save_gb_per_s": round(saved.num_bytes / saved.seconds / 1e9, 3),
        "restore_cold_s": round(rounds[0], 3),
        "restore_s": [round(seconds, 3) for seconds in rounds[1:]],
        "restore_gb_per_s": round(saved.num_bytes / min(rounds[1:]) / 1e9, 3),
        "times_faster": round(computed_s / min(rounds[1:]), 1),
        "next_turn_s": round(turn_s, 3),
        "next_turn_cached_tokens": core.stats().prefix_cache_hits_total - before,
        "same_answer": again == expected,
    }


def start(arguments: argparse.Namespace, model: Path, folder: Path) -> EngineCore:
    config = EngineConfig(
        model=str(model),
        load_format="dummy",
        device=arguments.device,
        max_model_len=context(arguments),
        max_num_seqs=2,
        cuda_graphs=False,
        session_folder=folder,
    )
    core = EngineCore(config, progress=False)
    answer(core, [1, 2, 3], session_id=None)  # the first compilation and allocation are no part of the figures
    return core


def answer(core: EngineCore, prompt: list[int], session_id: str | None = ID) -> tuple[list[int], float]:
    """A greedy answer, and the seconds that it took."""
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    core.add_request(AddRequest(request_id="r", prompt_token_ids=prompt, sampling_params=params, session_id=session_id))
    tokens: list[int] = []
    while core.has_work:
        for output in core.step():
            tokens += output.token_ids
    return tokens, time.perf_counter() - started


def call(core: EngineCore, action: SessionAction) -> SessionDone:
    core.sessions.add(SessionCall("1", action, ID))
    while not (done := core.sessions.advance()):
        core.step()
    if done[0].error is not None:
        sys.exit(f"{action}: {done[0].error}")
    return done[0]


def restore(core: EngineCore) -> float:
    """Seconds, with nothing of it in the prefix cache."""
    core.scheduler.cache.clear()
    seconds = call(core, "restore").seconds
    print(f"restored in {seconds:.3f} s")
    return seconds


def let_go(path: Path) -> None:
    """Ask the system to forget a file's pages, so that they come from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
