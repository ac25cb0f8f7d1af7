"""The engine with a tiny model: what it refuses, how a sequence ends, and what it leaves behind."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from engines import Answer, answer, assert_nothing_held, drain, make_core, request
from leyden.engine import collector
from leyden.engine.boundary.loop import run_loop
from leyden.engine.core import EngineCore
from leyden.engine.errors import ConfigError, ContextLengthError, QueueFullError, RequestError
from leyden.engine.messages import AbortRequest, Shutdown, StepOutputs, ToEngine
from leyden.engine.sequence import Status
from leyden.models.mixers.lightning_backends import LIGHTNING_BACKENDS
from tiny_models import VOCAB, greedy, random_prompt

PROMPT = random_prompt(40, seed=3)


@pytest.fixture(scope="module", params=[False, True], ids=["at once", "a step behind"])
def core(tiny, request: pytest.FixtureRequest):
    """An engine that takes its tokens at once, and one that launches a step before it has those of the last."""
    return make_core(tiny.folder, async_scheduling=request.param)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(core):
    yield
    try:
        assert_nothing_held(core)
    finally:  # one failure stays one
        for each in [*core.scheduler.waiting, *core.scheduler.running]:
            core.abort_request(each.request_id)
        while core.has_work:
            core.step()


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([1, VOCAB], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([2**40], {}, "prompt"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ([1], {"stop_token_ids": (3, -1)}, "stop_token_ids"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"logit_bias": {-2: 1.0}}, "logit_bias"),
    ],
)
def test_impossible_request_is_refused_by_its_field(core, prompt, params, param):
    with pytest.raises(RequestError) as refused:
        core.add_request(request("r", prompt, **params))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("length", "max_tokens", "param"),
    [(257, 1, "prompt"), (256, 1, "prompt"), (256, None, "prompt"), (257, None, "prompt"), (900, None, "prompt"),
     (300, 0, "prompt"), (250, 7, "max_tokens"), (1, 256, "max_tokens")],
)  # fmt: skip
def test_prompt_and_answer_must_fit_the_context(core, length, max_tokens, param):
    with pytest.raises(ContextLengthError, match="256") as refused:
        core.add_request(request("r", [1] * length, max_tokens=max_tokens))
    assert refused.value.param == param
    assert not core.has_work


def test_id_that_is_in_use_is_refused_and_free_again_when_done(core):
    core.add_request(request("same", [1], max_tokens=1))
    with pytest.raises(RequestError, match="in use"):
        core.add_request(request("same", [1]))
    drain(core)
    assert drain(core, request("same", [1], max_tokens=1))["same"].finish_reason == "length"


def test_full_queue_refuses_and_keeps_nothing_of_the_refused(tiny):
    core = make_core(tiny.folder, max_waiting=2, max_num_seqs=1)
    for i in range(3):
        core.add_request(request(f"r{i}", [1], max_tokens=2))
    with pytest.raises(QueueFullError):
        core.add_request(request("late", [1], max_tokens=2))
    answers = drain(core)
    assert sorted(answers) == ["r0", "r1", "r2"]
    assert drain(core, request("late", [1], max_tokens=2))["late"].finish_reason == "length"


# -- how a sequence ends --------------------------------------------------------------------------------------


def test_without_max_tokens_the_answer_fills_the_context(core):
    got = answer(core, random_prompt(200, 1), max_tokens=None)
    assert len(got.token_ids) == 56 and got.finish_reason == "length"


def test_longest_answer_that_fits_is_served(core):
    assert len(answer(core, [1], max_tokens=255).token_ids) == 255
    assert len(answer(core, [1] * 255, max_tokens=1).token_ids) == 1


def test_max_tokens_zero_scores_the_prompt_and_samples_nothing(core, tiny):
    got = answer(core, PROMPT, max_tokens=0, prompt_logprobs=0)
    assert (got.token_ids, got.finish_reason, len(got.prompt_logprobs)) == ([], "length", len(PROMPT))
    assert answer(core, [1] * 256, max_tokens=0).finish_reason == "length", "a full context can be scored"


def test_stop_token_ends_the_answer_and_is_its_last_token(core, tiny):
    expected = greedy(tiny.model, PROMPT, 20)
    stop = expected[7]
    first = expected.index(stop)
    got = answer(core, PROMPT, max_tokens=20, stop_token_ids=(stop,))
    assert (got.token_ids, got.finish_reason, got.stop_token_id) == (expected[: first + 1], "stop", stop)


def test_eos_ends_the_answer_unless_ignored(core, tiny):
    expected = greedy(tiny.model, PROMPT, 20)
    eos = (expected[5],)
    first = expected.index(eos[0])
    assert answer(core, PROMPT, max_tokens=20, eos=eos).token_ids == expected[: first + 1]
    got = answer(core, PROMPT, max_tokens=20, eos=eos, ignore_eos=True)
    assert (got.token_ids, got.finish_reason) == (expected, "length")


def test_min_tokens_keeps_the_stop_ids_away_and_no_longer(core):
    free = answer(core, PROMPT, max_tokens=12).token_ids
    got = answer(core, PROMPT, max_tokens=12, min_tokens=6, eos=(free[0],), stop_token_ids=(free[1],))
    assert len(got.token_ids) >= 6
    assert not {free[0], free[1]} & set(got.token_ids[:6])
    # After the sixth token they count again: biased to be certain, eos is the seventh.
    bias = {free[0]: 100.0}
    got = answer(core, PROMPT, max_tokens=12, min_tokens=6, eos=(free[0],), logit_bias=bias)
    assert (len(got.token_ids), got.token_ids[-1], got.finish_reason) == (7, free[0], "stop")


def test_greedy_equals_transformers_with_all_features_of_the_run(core, tiny):
    assert answer(core, PROMPT, max_tokens=16).token_ids == greedy(tiny.model, PROMPT, 16)


# -- log-probabilities ----------------------------------------------------------------------------------------


def check_prompt_logprobs(tiny, prompt: list[int], got: Answer, num_top: int) -> None:
    table = tiny.logprobs(prompt)
    assert got.prompt_logprobs[0] is None and len(got.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(got.prompt_logprobs[1:], start=1):
        row = table[position - 1]
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=2e-4)
        assert [v for _, v in entry.top[:num_top]] == pytest.approx(row.topk(num_top).values.tolist(), abs=2e-4)
        assert [t for t, _ in entry.top].count(entry.token_id) == 1


@pytest.mark.parametrize("budget", [4, 7, 39, 64])
def test_prompt_logprobs_do_not_depend_on_the_chunks_and_equal_transformers(tiny, budget):
    core = make_core(tiny.folder, max_num_batched_tokens=budget)
    got = answer(core, PROMPT, max_tokens=2, prompt_logprobs=3)
    check_prompt_logprobs(tiny, PROMPT, got, 3)


@pytest.mark.parametrize("budget", [4, 64])
def test_scores_of_a_prompt_are_sent_in_small_messages_as_computed(tiny, monkeypatch, budget):
    monkeypatch.setattr(collector, "SCORED_TOKENS", 10)
    core = make_core(tiny.folder, max_num_batched_tokens=budget)
    inbox, messages = [request("scored", PROMPT, max_tokens=2, prompt_logprobs=3), request("other", [1])], []

    def receive(wait: float) -> list[ToEngine]:
        received, inbox[:] = inbox.copy(), []
        return received or ([Shutdown()] if wait else [])

    run_loop(core, receive, messages.append)
    sent = [message.outputs for message in messages if message.outputs]
    scored = [outputs for outputs in sent if outputs[0].prompt_logprobs]
    assert max(len(outputs[0].prompt_logprobs) for outputs in scored) <= 10
    assert {len(outputs) for outputs in scored} == {1}
    got, begun = Answer(), []
    for output in itertools.chain(*sent):
        if output.request_id == "scored":
            begun.append(bool(output.token_ids))
            got.add(output)
    check_prompt_logprobs(tiny, PROMPT, got, 3)
    assert begun == sorted(begun) and len(got.token_ids) == 2, "all of them before the answer"
    if budget == 4:
        assert sent.index(scored[0]) < next(i for i, each in enumerate(sent) if each[0].request_id == "other")


def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt(tiny):
    core = make_core(tiny.folder, num_kv_blocks=6, block_size=16, max_num_batched_tokens=8, max_num_seqs=2)
    core.add_request(request("first", random_prompt(30, 8), max_tokens=50, ignore_eos=True))
    answers: dict[str, Answer] = {}
    core.add_request(request("second", PROMPT, max_tokens=3, prompt_logprobs=3))
    fallen_half_way = False
    while core.has_work:
        before = {s.request_id: s.num_computed_tokens for s in core.scheduler.running}
        for output in core.step():
            answers.setdefault(output.request_id, Answer()).add(output)
        core.check_integrity()
        second = next((s for s in core.scheduler.waiting if s.request_id == "second"), None)
        if second is not None and 0 < before.get("second", 0) < len(PROMPT):
            fallen_half_way = True
        if 0 < before.get("second", 0) < 30 and not fallen_half_way:  # by hand, when nature does not
            core.scheduler.preemption.preempt(next(s for s in core.scheduler.running if s.request_id == "second"))
            fallen_half_way = True
    assert fallen_half_way
    check_prompt_logprobs(tiny, PROMPT, answers["second"], 3)


def test_one_token_prompt_has_one_empty_score(core):
    assert answer(core, [5], max_tokens=1, prompt_logprobs=2).prompt_logprobs == [None]


def test_logprobs_of_the_answer_equal_transformers(core, tiny):
    got = answer(core, PROMPT, max_tokens=10, logprobs=4, temperature=0.9, seed=5)
    table = tiny.logprobs(PROMPT + got.token_ids)[len(PROMPT) - 1 :]
    for token, entry, row in zip(got.token_ids, got.logprobs, table, strict=False):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=2e-4)
        assert [v for _, v in entry.top[:4]] == pytest.approx(row.topk(4).values.tolist(), abs=2e-4)


# -- seeds ----------------------------------------------------------------------------------------------------


def test_seed_gives_the_same_answer_alone_in_a_batch_and_after_a_preemption(tiny):
    core = make_core(tiny.folder)
    seeded = {"temperature": 1.0, "top_p": 0.95, "seed": 42, "max_tokens": 24}
    alone = answer(core, PROMPT, **seeded).token_ids
    assert answer(core, PROMPT, **seeded).token_ids == alone
    others = [request(f"o{i}", random_prompt(5 + i, i), temperature=1.0, max_tokens=10 + i) for i in range(5)]
    assert drain(core, *others[:3], request("x", PROMPT, **seeded), *others[3:])["x"].token_ids == alone
    small = make_core(tiny.folder, num_kv_blocks=7, block_size=16, max_num_batched_tokens=32)
    first = request("first", random_prompt(45, 1), temperature=1.0, max_tokens=30)
    answers = drain(small, first, request("x", PROMPT, **seeded))
    assert small.stats().preemptions_total > 0
    assert answers["x"].token_ids == alone
    assert answer(core, PROMPT, **(seeded | {"seed": 43})).token_ids != alone


def test_without_a_seed_equal_requests_differ_and_a_new_engine_repeats_them(tiny):
    runs = []
    for _ in range(2):
        core = make_core(tiny.folder, seed=9)
        runs.append([answer(core, PROMPT, temperature=1.0, max_tokens=12).token_ids for _ in range(2)])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


# -- aborts, errors, memory -----------------------------------------------------------------------------------


def test_abort_in_every_state_frees_everything(tiny):
    core = make_core(tiny.folder, max_num_seqs=2, max_num_batched_tokens=16)
    core.add_request(request("decoding", [1, 2], max_tokens=50))
    core.step()
    core.add_request(request("prefilling", PROMPT, max_tokens=5))
    core.step()
    core.add_request(request("waiting", [1], max_tokens=5))
    states = {s.request_id: s for s in [*core.scheduler.running, *core.scheduler.waiting]}
    assert states["decoding"].is_decoding
    assert 0 < states["prefilling"].num_computed_tokens < len(PROMPT)
    assert states["waiting"].status is Status.WAITING
    for name in ("waiting", "prefilling", "decoding"):
        core.abort_request(name)
        core.abort_request(name)  # again: nothing to do
        core.check_integrity()
        assert name not in core.scheduler and not states[name].block_table and states[name].state_slot is None
    assert core.step() == []
    assert_nothing_held(core)


def test_abort_of_an_unknown_id_is_nothing(core):
    core.abort_request("never seen")


def test_aborts_at_random_moments_leave_the_others_untouched(tiny):
    rng = random.Random(1)
    core = make_core(tiny.folder, num_kv_blocks=10, max_num_batched_tokens=24)
    expected = greedy(tiny.model, PROMPT, 20)
    got: list[int] = []
    core.add_request(request("x", PROMPT, max_tokens=20))
    for i in range(200):
        core.add_request(
            request(
                f"n{i}",
                random_prompt(rng.randint(1, 60), i),
                max_tokens=rng.randint(1, 20),
                priority=rng.choice([0, 1]),
            )
        )
        core.abort_request(f"n{rng.randint(0, i)}")
        for output in core.step():
            got += output.token_ids if output.request_id == "x" else []
        core.check_integrity()
        if len(got) == 20:
            break
    assert got == expected
    for i in range(200):
        core.abort_request(f"n{i}")
    assert_nothing_held(core)


def test_nan_fails_its_own_request_and_neither_neighbour_nor_next_owner(tiny):
    core = make_core(tiny.folder, max_num_seqs=3, num_kv_blocks=12)
    poison = 300  # no prompt and no answer uses it: ids beyond the bytes are never sampled here
    with torch.inference_mode():
        core.runner.model.embedding[poison] = float("nan")
    expected = greedy(tiny.model, PROMPT, 12)
    for _ in range(3):  # the poisoned slot and blocks are handed on dirty
        answers = drain(
            core,
            request("bad", [1, poison, 2], max_tokens=12, logprobs=2, prompt_logprobs=1),
            request("good", PROMPT, max_tokens=12),
            request("bad too", [*PROMPT, poison], temperature=1.0, top_p=0.5, max_tokens=12),
        )
        assert answers["good"].token_ids == expected
        for name in ("bad", "bad too"):
            assert (answers[name].finish_reason, answers[name].token_ids) == ("error", [])
            assert "NaN" in answers[name].error
        assert answer(core, PROMPT, max_tokens=12).token_ids == expected


def test_nan_weights_fail_every_request_and_leak_nothing(tiny):
    core = make_core(tiny.folder)
    with torch.inference_mode():
        core.runner.model.norm.weight.fill_(float("nan"))
    answers = drain(core, *(request(f"r{i}", PROMPT, max_tokens=5) for i in range(6)))
    assert {each.finish_reason for each in answers.values()} == {"error"} and len(answers) == 6


@pytest.mark.parametrize("block_size", [1, 2, 3, 64, 1024])
def test_every_block_size_serves_the_same_answer(tiny, block_size):
    core = make_core(tiny.folder, block_size=block_size)
    assert answer(core, PROMPT, max_tokens=12).token_ids == greedy(tiny.model, PROMPT, 12)


@pytest.mark.parametrize("max_model_len", [1, 2, 3])
def test_the_shortest_contexts_start_and_serve(tiny, max_model_len):
    core = make_core(tiny.folder, max_model_len=max_model_len, block_size=1)
    for length in range(1, max_model_len):
        assert answer(core, [1] * length, max_tokens=None).finish_reason == "length"
    assert answer(core, [1] * max_model_len, max_tokens=0).finish_reason == "length"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_serves_on_a_cpu_too(tiny, dtype):
    core = make_core(tiny.folder, dtype=dtype, max_num_batched_tokens=16)
    answers = drain(core, *(request(f"r{i}", PROMPT[: 5 + 9 * i], max_tokens=12, logprobs=1) for i in range(4)))
    assert all(each.finish_reason == "length" and len(each.token_ids) == 12 for each in answers.values())
    exact = tiny.logprobs(PROMPT[:32])[-1]
    assert answers["r3"].logprobs[0].logprob == pytest.approx(exact.max().item(), abs=0.3)


def test_state_in_half_precision_serves(tiny):
    core = make_core(tiny.folder, state_dtype="bfloat16", linear_backend="minimax")
    assert len(answer(core, PROMPT, max_tokens=12).token_ids) == 12
    assert core.info.state_bytes_per_slot == 4 * 16 * 16 * 2


@pytest.mark.parametrize("setting", LIGHTNING_BACKENDS)
def test_the_backend_told_is_the_one_that_runs(tiny, setting):
    core = make_core(tiny.folder, linear_backend=setting)
    told = core.info.linear_backend
    assert told == ("replay" if setting == "auto" else setting)
    assert core.runner.served.ring.replays is (told == "replay")


def test_backend_of_another_kind_of_layer_is_refused_with_the_models_own(tiny):
    with pytest.raises(
        ConfigError,
        match=r"^linear_backend = chunk: .* lightning layers are computed by auto, minimax, seg_la or replay$",
    ):
        make_core(tiny.folder, linear_backend="chunk")


def test_rings_beside_the_states_are_counted(tiny):
    plain, replay = (make_core(tiny.folder, linear_backend=name).info for name in ("minimax", "auto"))
    assert replay.state_bytes_per_slot - plain.state_bytes_per_slot == 4 * 16 * (16 + 16) * 4  # heads, ring, K + V


def test_stats_count_prompts_answers_and_steps_once(tiny):
    core = make_core(tiny.folder, max_num_batched_tokens=16)
    before = core.stats()
    drain(core, request("a", PROMPT, max_tokens=5), request("b", [1, 2], max_tokens=3))
    after = core.stats()
    assert (before.prompt_tokens_total, before.generation_tokens_total, before.steps_total) == (0, 0, 0)
    assert (after.prompt_tokens_total, after.generation_tokens_total) == (42, 8)
    assert after.steps_total > 0 and after.step_seconds_total > after.schedule_seconds_total > 0
    drain(core, request("c", [1, 2], max_tokens=0))
    assert core.stats().prompt_tokens_total == 44


def test_queue_time_ends_with_the_first_step_and_is_told_once(tiny, monkeypatch):
    core, now = make_core(tiny.folder, max_num_seqs=1), [0.0]

    def clock() -> float:
        return now[0]

    monkeypatch.setattr("leyden.engine.core.time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    core.add_request(request("first", PROMPT, max_tokens=4))
    core.add_request(request("second", PROMPT, max_tokens=4))
    told: dict[str, list[float | None]] = {"first": [], "second": []}
    while core.has_work:
        now[0] += 1.0  # each step begins a second later
        for output in core.step():
            told[output.request_id].append(output.queue_seconds)
    assert told == {"first": [1.0, None, None, None], "second": [5.0, None, None, None]}


def test_start_is_told_once_and_before_the_step_that_computes_it(tiny):
    core = make_core(tiny.folder, max_num_seqs=1, max_num_batched_tokens=8)
    events, launch = [], core.launcher.launch
    core.launcher.launch = lambda batch: events.append("launch") or launch(batch)
    for name in ("a", "b"):
        core.add_request(request(name, PROMPT[:20], max_tokens=1))
    while core.has_work:
        core.step(events.append)
    assert events == [["a"], "launch", "launch", "launch", ["b"], "launch", "launch", "launch"]


def test_siblings_tell_their_queue_time(tiny, monkeypatch):
    core, now = make_core(tiny.folder, snapshot_min_tokens=1), [0.0]
    drain(core, request("before", PROMPT, max_tokens=1))

    def clock() -> float:
        return now[0]

    monkeypatch.setattr("leyden.engine.core.time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    core.add_request(request("cached", PROMPT, max_tokens=2))
    core.add_request(request("leader", [1, 2, 3], max_tokens=2, num_siblings=1))
    core.add_request(request("sibling", [1, 2, 3], max_tokens=2, sibling_of="leader"))
    told = {}
    while core.has_work:
        now[0] += 1.0
        for output in core.step():
            told.setdefault(output.request_id, (output.queue_seconds, output.num_cached_tokens))
    assert told == {"cached": (1.0, len(PROMPT) - 1), "leader": (1.0, 0), "sibling": (2.0, 0)}


def test_info_tells_the_loaded_model(core, tiny):
    info = core.info
    assert (info.architecture, info.layer_counts) == ("MiniMaxForCausalLM", {"lightning": 1, "softmax": 1})
    assert (info.vocab_size, info.max_model_len, info.dtype, info.device) == (VOCAB, 256, "float32", "cpu")
    assert info.num_parameters == sum(p.numel() for p in tiny.model.parameters())
    assert info.num_state_slots == 4 and info.notes == []
    assert info.state_bytes_per_slot == 4 * (16 * 16 + 16 * (16 + 16)) * 4 and info.kv_bytes_per_token == 2 * 2 * 16 * 4


def test_triton_on_a_cpu_is_refused_where_nothing_interprets_it(tiny, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="kernels = triton"):
        make_core(tiny.folder, device="cpu", kernels="triton")


# -- waiting ----------------------------------------------------------------------------------------------------


def test_long_wait_is_refused_before_the_start_and_not_after(tiny, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("leyden.engine.core.time.monotonic", lambda: clock[0])
    core = make_core(tiny.folder, max_num_seqs=1)
    running, waiting, patient = (request(name, [1], max_tokens=9) for name in ("running", "waiting", "patient"))
    running.max_queue_seconds = waiting.max_queue_seconds = 5.0
    for each in (running, waiting, patient):
        core.add_request(each)
    outputs = core.step()
    core.scheduler.preemption.preempt(core.scheduler.running[0])
    clock[0] += 4.9
    outputs += core.step()
    core.scheduler.preemption.preempt(core.scheduler.running[0])
    assert {output.request_id for output in outputs} == {"running"}
    clock[0] += 0.3
    (late,) = [output for output in core.step() if output.request_id == "waiting"]
    assert (late.finish_reason, late.error_code) == ("error", "queue_timeout")
    assert "max_queue_seconds" in late.error
    core.check_integrity()
    clock[0] += 1000
    answers = drain(core)
    assert {name: each.finish_reason for name, each in answers.items()} == {"running": "length", "patient": "length"}


def test_wait_for_a_snapshot_under_way_does_not_expire(tiny, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("leyden.engine.core.time.monotonic", lambda: clock[0])
    core = make_core(tiny.folder, max_num_batched_tokens=5, snapshot_min_tokens=1)
    for name in ("first", "second"):
        each = request(name, PROMPT, max_tokens=3)
        each.max_queue_seconds = 5.0
        core.add_request(each)
    core.step()
    clock[0] += 6.0
    answers = drain(core)
    assert {name: each.finish_reason for name, each in answers.items()} == {"first": "length", "second": "length"}
    assert core.stats().prefix_cache_hits_total == len(PROMPT) - 1


# -- a device slower than the host ------------------------------------------------------------------------------


class SlowDevice:
    """Completes a step only when the host waits for it. `launched`: the requests of each step, in order."""

    def __init__(self, core: EngineCore, on_completion: Callable[[int], None]) -> None:
        self.launched: list[list[str]] = []
        self.num_completed = self.most_ahead = 0
        self._launch, self._on_completion = core.launcher.launch, on_completion
        core.launcher.launch = self.launch

    def launch(self, batch):
        step = self._launch(batch)
        self.launched.append([each.request_id for each in batch.sequences])
        self.most_ahead = max(self.most_ahead, len(self.launched) - self.num_completed)
        if step.sampled is not None:  # else the host has nothing to wait for
            step.sampled = Awaited(step.sampled, self.complete)
        return step

    def complete(self) -> None:
        self.num_completed += 1
        self._on_completion(self.num_completed)


class Awaited:
    def __init__(self, sampled, on_wait: Callable[[], None]) -> None:
        self._sampled, self._on_wait = sampled, on_wait

    def wait(self):
        self._on_wait()
        return self._sampled.wait()


def test_the_engine_listens_while_the_device_computes_a_long_prompt(tiny):
    """A prompt of 50 chunks, none of which draws a token but the last."""
    core = make_core(tiny.folder, async_scheduling=True, max_num_batched_tokens=4)
    inbox: list[ToEngine] = [request("long", random_prompt(200, 1), max_tokens=1)]
    read_at: list[int] = []  # steps launched by then
    first_tokens: dict[str, int] = {}

    def send_at_the_third(num_completed: int) -> None:
        if num_completed == 3:
            inbox.extend([AbortRequest("long"), request("short", [1, 2, 3], max_tokens=1)])

    device = SlowDevice(core, send_at_the_third)

    def receive(wait: bool) -> list[ToEngine]:
        messages, inbox[:] = inbox.copy(), []
        if messages:
            read_at.append(len(device.launched))
        return messages or ([Shutdown()] if wait else [])

    def note(message) -> None:
        if isinstance(message, StepOutputs):
            first_tokens.update(dict.fromkeys([o.request_id for o in message.outputs], len(device.launched)))

    run_loop(core, receive, note)
    assert device.most_ahead == 2
    assert read_at == [0, 4], "with the third complete, one more step was under way"
    assert "long" not in [name for step in device.launched[4:] for name in step]
    assert first_tokens == {"short": 5}
