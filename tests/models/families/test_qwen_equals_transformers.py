"""Token-for-token equality with transformers in float32, greedy: every class of Qwen3-Next and Qwen3.5, however a batch
is cut and mixed, and after every way in which a state can be left and taken up again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from backends import OF_DELTA
from engines import answer, call_session, computed, drain, request
from leyden.engine.core import EngineCore
from leyden.engine.errors import ContextLengthError
from qwen_models import DENSE, MOE, NEXT, ROPE, make_model, save_model, wrap
from tiny_models import greedy, random_prompt

NUM_TOKENS = 16
LENGTHS = (1, 2, 3, 4, 63, 64, 65, 127, 128, 129)  # a convolution's tail, and chunks of 64, before and after they fill
LONG = {"max_model_len": 4200, "cpu_memory_gb": 0.2}  # settings for texts of thousands of tokens
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Variant:
    """A class of transformers, what its config has that is not `TINY`'s, and whether the files are those of a vision
    model, as the official ones are."""

    architecture: str
    changes: dict[str, Any]
    is_wrapped: bool = False


VARIANTS = {
    "Next, a dense layer": Variant(NEXT, {"mlp_only_layers": [1]}),
    "3.5, 3 value heads per key head, tied, in a vision model": Variant(
        DENSE, {"linear_num_value_heads": 6, "tie_word_embeddings": True}, is_wrapped=True
    ),
    "3.5 MoE, 4 value heads per key head, fused experts in a vision model": Variant(
        MOE, {"linear_num_value_heads": 8}, is_wrapped=True
    ),
    "3.5 MoE, experts one by one, yarn": Variant(
        MOE, {"rope_parameters": ROPE | YARN, "shared_expert_intermediate_size": 16}
    ),
    "3.5, a full layer first, sigmoid gate, values wider than keys": Variant(
        DENSE,
        {
            "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
            "output_gate_type": "sigmoid",
            "linear_value_head_dim": 32,
        },
    ),
}
CLASSES = list(VARIANTS.values())[:3]  # one of each


@dataclass(frozen=True)
class Oracle:
    folder: Path
    model: Any

    def logits(self, ids: list[int]) -> torch.Tensor:
        """[T, vocab], all computed at once."""
        with torch.inference_mode():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    def check(self, text: list[int], ids: list[int]) -> None:
        """`ids` is the greedy answer to `text`: each token is the likeliest one after those before it. So one forward
        says what a greedy answer made without a cache would, many times as fast."""
        assert ids == self.logits([*text, *ids[:-1]])[len(text) - 1 :].argmax(-1).tolist(), f"prompt of {len(text)}"

    def check_all(self, answers: dict[str, engines.Answer]) -> None:
        """Of prompts that bear their length as a name."""
        for name, found in answers.items():
            self.check(prompt(int(name)), found.token_ids)


@functools.cache
def prompt(length: int) -> list[int]:
    return random_prompt(length, seed=length)


def check_scores(oracle: Oracle, text: list[int], found: engines.Answer) -> None:
    table = oracle.logits(text)[:-1].log_softmax(-1)
    assert found.prompt_logprobs[0] is None
    for token, entry, row in zip(text[1:], found.prompt_logprobs[1:], table, strict=True):
        assert entry.token_id == token and abs(entry.logprob - float(row[token])) < 2e-4


def requests(*lengths: int, **params: Any) -> list[Any]:
    return [request(str(n), prompt(n), **{"max_tokens": NUM_TOKENS} | params) for n in lengths]


def make_oracle(folder: Path, variant: Variant, **changes: Any) -> Oracle:
    model = make_model(variant.architecture, **variant.changes | changes)
    save_model(folder, model)
    if variant.is_wrapped:
        wrap(folder)
    return Oracle(folder, model)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request, tmp_path_factory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("qwen"), request.param)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(each, id=each.architecture, marks=[pytest.mark.slow] if each.architecture == MOE else [])
        for each in CLASSES
    ],
)
def oracle(request, tmp_path_factory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("qwen"), request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("qwen"), CLASSES[1])


@pytest.fixture(scope="module")
def long_dense(tmp_path_factory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("qwen"), CLASSES[1], max_position_embeddings=8192)


def make_core(oracle: Oracle, **settings: Any) -> EngineCore:
    return engines.make_core(oracle.folder, **settings)


# -- one prompt, many prompts, cut prompts -----------------------------------------------------------------------


def test_answers_alone_are_those_of_transformers(variant):
    expected = {n: greedy(variant.model, prompt(n), NUM_TOKENS) for n in (1, 65)}
    for backend in OF_DELTA:
        core = make_core(variant, linear_backend=backend, max_num_batched_tokens=256, prefix_cache=False)
        for n in LENGTHS:  # one after another: slots are reused, and dirty
            ids = answer(core, prompt(n), max_tokens=NUM_TOKENS).token_ids
            assert len(set(ids)) > 6, "a constant answer proves nothing"
            variant.check(prompt(n), ids)
            assert ids == expected.get(n, ids)


@pytest.mark.parametrize(("backend", "chunk"), [*product(OF_DELTA, [7, 64]), ("replay", 257)])
def test_answers_in_ragged_mixed_batches_are_those_of_transformers(oracle, backend, chunk):
    core = make_core(oracle, linear_backend=backend, max_num_batched_tokens=chunk, max_num_seqs=7, prefix_cache=False)
    for _ in range(1 if chunk == 7 else 2):  # the second round finds every slot and block used
        oracle.check_all(drain(core, *requests(*LENGTHS)))


@pytest.mark.parametrize(("backend", "chunk"), [*product(OF_DELTA, [1, 2, 3])])
def test_prompt_fed_in_pieces_shorter_than_the_convolution(oracle, backend, chunk):
    core = make_core(oracle, linear_backend=backend, max_num_batched_tokens=chunk, max_num_seqs=1)
    oracle.check_all(drain(core, *requests(4, 65)))


def test_rows_packed_into_one_step_do_not_see_each_other(oracle):
    """Prompts of 1 to 64 tokens, one behind the other."""
    lengths = range(1, 65)
    core = make_core(oracle, max_num_seqs=64, max_num_batched_tokens=sum(lengths), cpu_memory_gb=0.2)
    counts = computed(core)
    answers = drain(core, *requests(*lengths, max_tokens=2))
    assert counts == [sum(lengths), 64]
    oracle.check_all(answers)


def test_answers_that_end_one_after_another_are_those_of_each_alone(dense):
    """1 to 9 at once, of which each ends two tokens before the next."""
    core = make_core(dense, max_num_seqs=9, max_num_batched_tokens=257, prefix_cache=False)
    for count in range(1, 10):
        dense.check_all(drain(core, *(requests(n, max_tokens=1 + 2 * n)[0] for n in range(1, count + 1))))


@pytest.mark.parametrize("drafts", [0, 7])
@pytest.mark.parametrize("backend", OF_DELTA)
def test_texts_end_where_the_context_does(dense, backend, drafts):
    core = make_core(dense, linear_backend=backend, max_model_len=129, speculative_tokens=drafts)
    core.scheduler.speculation._propose = lambda each, count: [7] * count
    for length in (1, 64, 65, 127, 128):
        for max_tokens in range(max(1, 128 - length), 130 - length):  # one token short of it, and all of it
            found = answer(core, prompt(length), max_tokens=max_tokens)
            assert len(found.token_ids) == max_tokens
            dense.check(prompt(length), found.token_ids)
        with pytest.raises(ContextLengthError):
            core.add_request(request("long", prompt(length), max_tokens=130 - length))
    check_scores(dense, prompt(129), answer(core, prompt(129), max_tokens=0, prompt_logprobs=1))
    assert (core.stats().draft_tokens_total > 0) == (drafts > 0)


# -- states that are left and taken up again ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", OF_DELTA)
def test_answers_after_preemption_are_those_of_transformers(oracle, backend):
    core = make_core(oracle, linear_backend=backend, num_kv_blocks=24, block_size=16, prefix_cache=False)
    oracle.check_all(drain(core, *requests(63, 64, 65, 128, max_tokens=40)))
    assert core.stats().preemptions_total > 0


@pytest.mark.parametrize("backend", OF_DELTA)
def test_scores_of_a_prompt_that_is_preempted_on_its_way_come_once(dense, backend):
    """The answer before it grows into the last blocks."""
    core = make_core(dense, linear_backend=backend, num_kv_blocks=12, block_size=16, max_num_batched_tokens=20)
    answers = drain(core, *requests(63, 128, max_tokens=40, prompt_logprobs=1))
    assert core.stats().preemptions_total > 0
    dense.check_all(answers)
    for length in (63, 128):
        check_scores(dense, prompt(length), answers[str(length)])


@pytest.mark.parametrize("backend", OF_DELTA)
def test_request_that_needs_all_blocks_is_computed_once(dense, backend):
    """Beside others, of which one falls for it; then one whose cached beginning lies in blocks that are in its way."""
    core = make_core(dense, linear_backend=backend, num_kv_blocks=20, block_size=16, max_model_len=320)
    counts, (first, *others) = computed(core), requests(295, 1, 63, 64, max_tokens=24)
    core.add_request(first)
    assert core.step() == []
    dense.check_all(drain(core, *others))
    assert core.stats().preemptions_total > 0
    assert sum(counts) <= 295 + 2 * (1 + 63 + 64) + 5 * 23
    for text in (prompt(295), prompt(295)[:294] + prompt(16)):
        dense.check(text, answer(core, text, max_tokens=4).token_ids)


@pytest.mark.parametrize("backend", OF_DELTA)
def test_slot_of_an_aborted_prompt_does_not_show(dense, backend):
    core = make_core(dense, linear_backend=backend, max_num_batched_tokens=33, max_num_seqs=1)
    for n in (129, 65):
        core.add_request(requests(n)[0])
        core.step()
        core.step()
        core.abort_request(str(n))
        dense.check_all(drain(core, *requests(n)))


@pytest.mark.parametrize("backend", OF_DELTA)
def test_cached_prompts_are_answered_as_transformers_answers_them(oracle, backend):
    """The whole prompt comes back from its last state; a prompt that parts from it, from one saved on the way."""
    core = make_core(oracle, linear_backend=backend, snapshot_min_tokens=8, max_num_batched_tokens=100)
    parted = prompt(129)[:75] + prompt(4)
    for text, at_least in [(prompt(129), 0), (prompt(129), 128), (parted, 64)]:
        found = answer(core, text, max_tokens=NUM_TOKENS)
        assert found.num_cached_tokens >= at_least and (at_least or not found.num_cached_tokens)
        oracle.check(text, found.token_ids)


@pytest.mark.parametrize(("shared", "at_least"), [(100, 64), (500, 384), (2000, 1536)])
@pytest.mark.parametrize("backend", OF_DELTA)
def test_prompts_share_a_beginning_of_any_length(long_dense, backend, shared, at_least):
    """Snapshots lie 64 tokens apart at least, and the last one before the parting has three quarters of a long one."""
    core = make_core(long_dense, linear_backend=backend, snapshot_min_tokens=16, **LONG)
    for own, fewest in [(90, 0), (91, at_least)]:
        text = prompt(shared) + prompt(own)
        found = answer(core, text, max_tokens=4)
        assert fewest <= found.num_cached_tokens <= (shared if fewest else 0)
        long_dense.check(text, found.token_ids)


@pytest.mark.parametrize("backend", OF_DELTA)
def test_scores_after_a_hit_are_those_of_transformers(dense, backend):
    """The first tokens after a prompt that was computed, after the same one from the cache, and after one that parts
    from it behind a state that was saved on the way."""
    core = make_core(dense, linear_backend=backend, snapshot_min_tokens=8, max_num_batched_tokens=100)
    parted = prompt(128)[:75] + prompt(4)
    for text, num_cached in [(prompt(128), 0), (prompt(128), 127), (parted, 64)]:
        found = answer(core, text, max_tokens=50, logprobs=20)
        assert found.num_cached_tokens == num_cached
        table = dense.logits(text + found.token_ids)[len(text) - 1 : -1].log_softmax(-1)
        for entry, row in zip(found.logprobs, table, strict=True):
            assert all(abs(logprob - float(row[token])) < 2e-4 for token, logprob in entry.top)


@pytest.mark.parametrize("backend", OF_DELTA)
def test_session_goes_on_after_a_restart_as_transformers_would(oracle, backend, tmp_path):
    settings = {"linear_backend": backend, "session_folder": tmp_path}
    core = make_core(oracle, **settings)
    text = prompt(65) + answer(core, prompt(65), max_tokens=NUM_TOKENS, session_id="a").token_ids
    call_session(core, "save")
    again = make_core(oracle, **settings)
    call_session(again, "restore")
    text += prompt(4)
    counts = computed(again)
    oracle.check(text, answer(again, text, max_tokens=NUM_TOKENS).token_ids)
    assert sum(counts) == 1 + 4 + NUM_TOKENS - 1, "the last token of an answer is not fed"


@pytest.mark.parametrize("dropped", [0, 5], ids=["history kept", "thoughts dropped"])
@pytest.mark.parametrize("backend", OF_DELTA)
def test_turns_of_a_chat_compute_what_is_new_in_them(dense, backend, dropped):
    """And at most 64 tokens more, where the template takes the thoughts out of an earlier answer."""
    core = make_core(dense, linear_backend=backend, snapshot_min_tokens=8)
    counts = computed(core)
    text: list[int] = []
    last: list[int] = []
    for turn in range(8):
        new = last[dropped:] + prompt(9 + turn)
        text, before = text + new, sum(counts)
        num_kept = 0 if dropped else len(last[:-1])  # an answer's last token is not fed
        last = answer(core, text, max_tokens=12).token_ids
        dense.check(text, last)
        num_computed = sum(counts) - before - len(last[:-1])
        assert num_computed <= len(new) - num_kept + (64 if dropped else 0), f"turn {turn}"


@pytest.mark.parametrize("backend", OF_DELTA)
def test_siblings_are_answered_as_transformers_answers_the_first(dense, backend):
    core = make_core(dense, linear_backend=backend, max_num_batched_tokens=32)
    first = request("0", prompt(65), num_siblings=2, max_tokens=NUM_TOKENS)
    others = [request(name, prompt(65), sibling_of="0", max_tokens=NUM_TOKENS) for name in "12"]
    for found in drain(core, first, *others).values():
        dense.check(prompt(65), found.token_ids)


# -- drafts ------------------------------------------------------------------------------------------------------

Drafter = Callable[[list[int], int, int], list[int]]  # the right answer, tokens that are known, how many at most


def always_right(ids: list[int], known: int, count: int) -> list[int]:
    return ids[known : known + count]


def always_wrong(ids: list[int], known: int, count: int) -> list[int]:
    return [(token + 1) % 250 for token in ids[known : known + count]]


def now_and_then(ids: list[int], known: int, count: int) -> list[int]:
    """From none to all, and every third token wrong."""
    drafts = ids[known : known + known % (count + 1)]
    return [token if (known + i) % 3 else (token + 1) % 250 for i, token in enumerate(drafts)]


@pytest.mark.parametrize("backend", OF_DELTA)
def test_drafts_leave_the_answer_of_transformers(oracle, backend):
    check_drafts(oracle, backend, now_and_then)


@pytest.mark.parametrize("drafter", [always_right, always_wrong])
@pytest.mark.parametrize("backend", OF_DELTA)
def test_the_best_drafts_and_the_worst_leave_the_answer_of_transformers(dense, backend, drafter):
    check_drafts(dense, backend, drafter)


def check_drafts(oracle: Oracle, backend: str, drafter: Drafter) -> None:
    """The same prompt three times, with the prefix cache and without, and the next turn of the chat; the same tokens
    come from the cache as without drafts."""
    settings, length = {"linear_backend": backend, "snapshot_min_tokens": 8}, 60
    plain, core = make_core(oracle, **settings), make_core(oracle, **settings, speculative_tokens=7)
    ids = answer(plain, prompt(65), max_tokens=length).token_ids
    oracle.check(prompt(65), ids)
    known = lambda each: each.num_output_tokens - each.ends_in_unseen  # noqa: E731
    core.scheduler.speculation._propose = lambda each, count: drafter(ids, known(each), count) if count > 0 else []
    for is_cached, num_cached in [(True, 0), (True, 64), (False, 0)]:
        found = answer(core, prompt(65), max_tokens=length, prefix_cache=is_cached)
        assert (found.token_ids, found.num_cached_tokens) == (ids, num_cached)
    turns = [answer(each, prompt(65) + ids + prompt(4), max_tokens=1) for each in (plain, core)]
    assert turns[0] == turns[1] and turns[0].num_cached_tokens == 65 + length - 1
    stats = core.stats()
    assert stats.draft_tokens_total > 0
    assert (stats.accepted_tokens_total > 0) == (drafter is not always_wrong)
    assert (stats.accepted_tokens_total == stats.draft_tokens_total) == (drafter is always_right)


# -- long, and by the kernels of a GPU ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", OF_DELTA)
def test_thousands_of_tokens_are_those_of_transformers(long_dense, backend):
    """A state kept in less than float32 drifts away in such a text."""
    core = make_core(long_dense, linear_backend=backend, **LONG)
    found = drain(core, request("x", prompt(65), max_tokens=4096), max_steps=5000)["x"]
    long_dense.check(prompt(65), found.token_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", OF_DELTA)
def test_answers_on_a_gpu_are_those_of_transformers(oracle, backend):
    core = make_core(oracle, device="cuda", linear_backend=backend, max_num_batched_tokens=100, max_num_seqs=7)
    for _ in range(2):  # the second round comes from the cache
        oracle.check_all(drain(core, *requests(*LENGTHS)))


@pytest.mark.parametrize(
    ("device", "length", "chunks"),
    [("cpu", 1500, (512, 100)), pytest.param("cuda", 100_000, (8192, 1000), marks=pytest.mark.gpu)],
)
def test_a_long_prompt_is_answered_alike_whatever_its_chunks(tmp_path, device, length, chunks):
    """States that chunks of several sizes leave differ by rounding alone, and so do the scores after them."""
    folder = make_oracle(tmp_path, Variant(DENSE, {"max_position_embeddings": length + 8})).folder
    text, found = random_prompt(length, seed=1), []
    for chunk in chunks:
        settings = {"max_num_batched_tokens": chunk, "max_model_len": length + 8, "max_num_seqs": 1}
        core = engines.make_core(folder, device=device, cpu_memory_gb=0.2, **settings)
        found.append(answer(core, text, max_tokens=8, logprobs=5))
    one, other = found
    assert one.token_ids == other.token_ids
    for entry, twin in zip(one.logprobs, other.logprobs, strict=True):
        (ids, scores), (other_ids, other_scores) = (zip(*each.top, strict=True) for each in (entry, twin))
        assert ids == other_ids and scores == pytest.approx(other_scores, abs=1e-4)


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [
        (DENSE, "replay"),
        pytest.param(DENSE, "chunk", marks=pytest.mark.slow),
        pytest.param(NEXT, "replay", marks=pytest.mark.slow),
    ],
)
def test_interpreted_triton_kernels(tmp_path, architecture, backend):
    """The kernels of a GPU, run by Triton's interpreter: ragged mixed batches, and cut prompts."""
    pytest.importorskip("triton")
    small = {"num_hidden_layers": 2, "full_attention_interval": 2, "hidden_size": 32, "linear_num_key_heads": 1}
    oracle = make_oracle(tmp_path, Variant(architecture, small | {"linear_num_value_heads": 2}))
    settings = {"kernels": "triton", "linear_backend": backend, "block_size": 4}
    core = make_core(oracle, max_num_seqs=3, max_num_batched_tokens=10, **settings)
    oracle.check_all(drain(core, *requests(7, 8, 1, max_tokens=3)))


# -- in bfloat16, at a real shape --------------------------------------------------------------------------------

SHAPE_08B = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "head_dim": 256,
    "num_attention_heads": 8,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize(
    ("device", "size"),
    [
        pytest.param("cpu", {"num_hidden_layers": 4, "vocab_size": 1000}, marks=pytest.mark.slow),
        pytest.param("cuda", {"num_hidden_layers": 24, "vocab_size": 248320}, marks=pytest.mark.gpu),
    ],
)
def test_scores_in_bfloat16_err_no_more_than_those_of_transformers(tmp_path, device, size):
    """Qwen3.5-0.8B with random weights, against the same weights computed in float32."""
    model = make_model(DENSE, **SHAPE_08B | size).bfloat16()
    save_model(tmp_path, model)
    text, model = prompt(200), model.to(device)
    scores = functools.partial(prompt_scores, text=torch.tensor(text, device=device))
    rounded, exact = scores(model), scores(model.float())
    del model
    core = engines.make_core(tmp_path, dtype="bfloat16", device=device, max_num_batched_tokens=100, cpu_memory_gb=0.5)
    found = answer(core, text, max_tokens=1, prompt_logprobs=1).prompt_logprobs
    ours = torch.tensor([entry.logprob for entry in found[1:]])
    assert (ours - exact).square().mean().sqrt() < 1.25 * (rounded - exact).square().mean().sqrt()


@torch.inference_mode()
def prompt_scores(model: Any, text: torch.Tensor) -> torch.Tensor:
    """[T - 1]: the log-probability of each token after those before it."""
    table = model(text[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return table.gather(1, text[1:, None])[:, 0].cpu()
