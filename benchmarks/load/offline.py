"""The engine alone: token ids in, token ids out, no HTTP. All requests of a case are there from the start, greedy."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from ...configs.schema import EngineConfig
from ...configs.sources import SettingsError, load_settings
from ...engine.core import EngineCore
from ...engine.messages import EngineStats
from ...models.families.registry import read_config
from ...models.loading.checkpoint import resolve
from .errors import BenchError
from .flags import OFFLINE_CASES, OfflineCase
from .machine import hardware, software
from .profile import StepProfile, print_profile, profile_decode, profile_prefill, tokens_to_profile
from .submit import random_requests, submit

WARM_UP_ANSWER = 4
BATCHED_TOKENS = 8192


def measure_offline(
    model: str,
    named: list[OfflineCase] | None,
    *,
    load_format: str = "auto",
    engine: dict[str, str],
    repeats: int = 1,
    profile_folder: Path | None = None,
) -> dict[str, Any]:
    """Every case on one engine that has room for the largest, then the profiles. The cases are those `named`, else the
    default ones that fit. `engine` are settings as in YAML.

    Raises `SettingsError`, `ConfigError`, `CheckpointError` or `BenchError`.
    """
    given = {"model": model, "load_format": load_format}
    cases, settings = choose(given, named, engine, is_profiled=profile_folder is not None)
    config = load_settings(given | settings).engine()
    started = time.perf_counter()
    core = EngineCore(config)
    startup = time.perf_counter() - started
    gc.collect()
    gc.freeze()  # as the engine's own process does
    info = core.info
    report = {
        "model": model,
        "hardware": hardware(),
        "software": software(),
        "linear_backend": info.linear_backend,
        "dtype": info.dtype,
        "quantised_bytes": info.quantised_bytes,
        "state_dtype": info.state_dtype,
        "engine": settings,
        "engine_startup_s": round(startup, 2),
        "memory_bytes": msgspec.structs.asdict(info.memory),
        "cases": [_measure_case(core, case, repeats) for case in cases],
    }
    if profile_folder is not None:
        report["profiles"] = [_summary(profile) for profile in profile_steps(core, cases, profile_folder)]
    return report


def profile_steps(core: EngineCore, cases: list[OfflineCase], folder: Path) -> list[StepProfile]:
    """A decode step of each number of rows among the cases that answer, and a full step of the longest prompt. Each is
    printed, and its trace and table are written to `folder`."""
    batches = {case.requests: case.prompt for case in reversed(cases) if case.answer > 1}
    profiles = []
    for num_requests, prompt in sorted(batches.items()):
        profiles.append(profile_decode(core, num_requests, prompt, folder))
        print_profile(profiles[-1])
    profiles.append(profile_prefill(core, max(case.prompt for case in cases), folder))
    print_profile(profiles[-1])
    return profiles


def _summary(profile: StepProfile) -> dict[str, Any]:
    """A profile without its table, which has a file of its own."""
    return {name: value for name, value in asdict(profile).items() if name != "operations"}


def choose(
    given: dict[str, str], named: list[OfflineCase] | None, engine: dict[str, str], *, is_profiled: bool
) -> tuple[list[OfflineCase], dict[str, Any]]:
    """The cases to measure, and settings that give them room: `engine`'s, and others that it leaves open.

    Raises `SettingsError` when a case that was named, or each of the default ones, exceeds the context.
    """
    cases = named or [OfflineCase.parse(case) for case in OFFLINE_CASES.split()]
    room = {"max_num_seqs": max(case.requests for case in cases), "max_num_batched_tokens": BATCHED_TOKENS}
    asked = load_settings(given | room | engine).engine()
    budget = asked.max_num_batched_tokens
    lengths = {case: _length(case, budget, is_profiled=is_profiled) for case in cases}
    context = _context(asked, is_limited="max_model_len" in engine)
    too_long = [case for case in cases if lengths[case] > context]
    if too_long and (named or too_long == cases):
        longest = max(too_long, key=lengths.__getitem__)
        raise SettingsError(
            f"--cases {longest}{' with --profile' * is_profiled} takes {lengths[longest]:,} tokens per request; "
            f"the context is {context:,}: name shorter cases"
        )
    for case in too_long:
        print(f"left out {case}: the context is {context:,}", file=sys.stderr)
    cases = [case for case in cases if case not in too_long]
    return cases, _room_for(cases, max(lengths[case] for case in cases), budget) | engine


def _length(case: OfflineCase, budget: int, *, is_profiled: bool) -> int:
    """Tokens that a sequence of the case may come to have."""
    profiled = tokens_to_profile(case.requests, case.prompt, budget) if is_profiled else 0
    return case.prompt + max(case.answer, profiled)


def _context(config: EngineConfig, *, is_limited: bool) -> int:
    """The checkpoint's context in tokens, or what `max_model_len` leaves of it."""
    longest = read_config(resolve(config.model, config.revision, weights=False)).max_model_len
    return min(longest, config.max_model_len or longest) if is_limited else longest


def _room_for(cases: list[OfflineCase], length: int, budget: int) -> dict[str, Any]:
    return {
        "max_num_seqs": max(case.requests for case in cases),
        "max_model_len": length,
        "max_num_batched_tokens": budget,
        "mixed_prefill_tokens": budget,  # no client reads along
        "prefix_cache": False,  # its memory would be the batch's, and no prompt comes twice
    }


def _measure_case(core: EngineCore, case: OfflineCase, repeats: int) -> dict[str, Any]:
    """The run of median time, after one with short answers that is not counted."""
    _run(core, case.requests, case.prompt, min(case.answer, WARM_UP_ANSWER), seed=0)
    runs = [_run(core, case.requests, case.prompt, case.answer, seed=1 + i) for i in range(repeats)]
    seconds = statistics.median_low(seconds for seconds, _ in runs)
    spent = next(spent for other, spent in runs if other == seconds)
    return {
        **asdict(case),
        "seconds": round(seconds, 6),
        "all_seconds": [round(seconds, 6) for seconds, _ in runs],
        "ms_per_step": round(seconds / case.answer * 1e3, 3),
        "answer_tokens_per_s": round(case.requests * case.answer / seconds, 1),
        "prompt_tokens_per_s": round(case.requests * case.prompt / seconds, 1),
        **spent,
    }


def _run(core: EngineCore, num_requests: int, prompt: int, answer: int, *, seed: int) -> tuple[float, dict[str, Any]]:
    """Seconds from the first request to the last token, and what the engine's host did meanwhile."""
    requests = random_requests(core, num_requests, prompt, answer, seed=seed)
    before = core.stats()
    started, tokens = time.perf_counter(), 0
    submit(core, requests)
    while core.has_work:
        tokens += sum(len(output.token_ids) for output in core.step())
    seconds = time.perf_counter() - started
    if tokens != num_requests * answer:
        raise BenchError(
            f"expected {num_requests * answer} tokens, got {tokens}: the model gave NaN or infinite logits"
        )
    return seconds, _host_time(before, core.stats())


def _host_time(before: EngineStats, now: EngineStats) -> dict[str, Any]:
    """Milliseconds of the host per step of decode rows alone, apart from waiting for the device."""
    steps = now.decode_steps_total - before.decode_steps_total
    host = now.decode_host_seconds_total - before.decode_host_seconds_total
    return {
        "engine_steps": now.steps_total - before.steps_total,
        "decode_steps": steps,
        "host_ms_per_decode_step": round(host / steps * 1e3, 3) if steps else None,
    }


def print_offline(report: dict[str, Any]) -> None:
    memory = report["memory_bytes"]
    print(
        f"\n{report['model']} on {report['hardware']}, {report['linear_backend']}, {report['dtype']}, state "
        f"{report['state_dtype']}; engine ready in {report['engine_startup_s']} s; "
        f"{memory['weights'] / 1e9:.2f} GB weights, {memory['state'] / 1e9:.2f} GB state, "
        f"{memory['kv'] / 1e9:.2f} GB KV cache"
    )
    print(
        f"{'requests':>9} {'prompt':>7} {'answer':>7} {'ms/step':>9} {'answer tokens/s':>16} {'prompt tokens/s':>16} "
        f"{'host ms/decode step':>20}"
    )
    for case in report["cases"]:
        print(
            f"{case['requests']:>9} {case['prompt']:>7} {case['answer']:>7} {case['ms_per_step']:>9} "
            f"{case['answer_tokens_per_s']:>16} {case['prompt_tokens_per_s']:>16} "
            f"{case['host_ms_per_decode_step'] or '-':>20}"
        )
