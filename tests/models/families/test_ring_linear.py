"""Ring-linear-2.0: its answers are those of the formulas, however a batch is cut, and what is not served is refused."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import pytest
from backends import BACKENDS
from engines import DEVICE, answer, computed, drain, request
from leyden.engine.core import EngineCore
from leyden.engine.messages import SessionCall
from ring_reference import TINY, Reference, make_tensors, save
from tiny_models import random_prompt

NUM_TOKENS = 20
LENGTHS = (1, 2, 17, 64, 65, 130)
VARIANTS: dict[str, dict[str, Any]] = {
    "as released": {},
    "slopes of the remote code": {"slope_layer_offset": 1},
    "layers that make no whole group": {"num_hidden_layers": 5, "layer_group_size": 2},
    "6 heads, 2 norm groups": {"num_attention_heads": 6, "num_key_value_heads": 3, "group_norm_size": 2},
    "tied, 1 norm group, 1 expert group": {
        "tie_word_embeddings": True,
        "group_norm_size": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_shared_experts": 2,
        "partial_rotary_factor": 1.0,
    },
    "no dense layer, no shared expert, no norm of queries and keys": {
        "first_k_dense_replace": 0,
        "num_shared_experts": 0,
        "use_qk_norm": False,
        "num_key_value_heads": 1,
    },
}


@dataclass(frozen=True)
class Oracle:
    """A checkpoint, and greedy answers to a few prompts by the formulas."""

    folder: Path
    reference: Reference
    expected: dict[int, tuple[list[int], list[int]]]  # prompt length -> prompt, answer

    def requests(self, *lengths: int, **params: Any) -> list[Any]:
        params = {"max_tokens": NUM_TOKENS} | params
        return [request(str(n), self.expected[n][0], **params) for n in lengths or self.expected]

    def check(self, answers: dict[str, engines.Answer]) -> None:
        for name, found in answers.items():
            assert found.token_ids == self.expected[int(name)][1], f"prompt of {name}"


def make_oracle(folder: Path, changes: dict[str, Any], lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Oracle:
    config = TINY | changes
    tensors = make_tensors(config, seed)
    save(folder, config, tensors)
    reference = Reference(config, tensors)
    prompts = {n: random_prompt(n, seed=n) for n in lengths}
    expected = {n: (prompt, reference.greedy(prompt, NUM_TOKENS)) for n, prompt in prompts.items()}
    assert all(len(set(ids)) > 8 for _, ids in expected.values()), "a constant answer proves nothing"
    return Oracle(folder, reference, expected)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request, tmp_path_factory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("ring"), request.param)


@pytest.fixture(scope="module")
def ring(tmp_path_factory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("ring"), {})


make_core = functools.partial(engines.make_core, device=DEVICE)


# -- equal to the formulas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_answer_alone_is_that_of_the_formulas(variant, backend):
    core = make_core(variant.folder, linear_backend=backend)
    for each in variant.requests():  # one after another: slots are reused, and dirty
        variant.check(drain(core, each))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("chunk", [7, 33, 256])
def test_answers_in_ragged_mixed_batches_are_those_of_the_formulas(variant, backend, chunk):
    core = make_core(variant.folder, linear_backend=backend, max_num_batched_tokens=chunk, max_num_seqs=6)
    variant.check(drain(core, *variant.requests()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probabilities_are_those_of_the_formulas(ring, backend):
    prompt, ids = ring.expected[17]
    core = make_core(ring.folder, linear_backend=backend)
    found = answer(core, prompt, max_tokens=NUM_TOKENS, logprobs=20)
    table = ring.reference.logits(prompt + ids)[len(prompt) - 1 : -1].log_softmax(-1)
    for entry, row in zip(found.logprobs, table, strict=True):
        assert len(entry.top) == 20
        for token, logprob in entry.top:
            assert abs(logprob - float(row[token])) < 2e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_after_preemption_are_those_of_the_formulas(ring, backend):
    core = make_core(ring.folder, linear_backend=backend, num_kv_blocks=21, block_size=16, prefix_cache=False)
    ring.check(drain(core, *ring.requests(17, 64, 65, 130)))
    assert core.stats().preemptions_total > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_prompt_and_one_that_parts_from_it_are_answered_by_the_formulas(ring, backend):
    """The whole prompt comes back from its last state, a part of it from one that was saved on the way."""
    core = make_core(ring.folder, linear_backend=backend, snapshot_min_tokens=8, max_num_batched_tokens=41)
    prompt, expected = ring.expected[130]
    parted = prompt[:75] + ring.expected[17][0]
    for text, ids, hits in [(prompt, expected, 0), (prompt, expected, 129), (parted, None, 74)]:
        before = core.stats().prefix_cache_hits_total
        ids = ids or ring.reference.greedy(parted, NUM_TOKENS)
        assert answer(core, text, max_tokens=NUM_TOKENS).token_ids == ids
        assert core.stats().prefix_cache_hits_total - before == hits


@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_leave_the_answers_of_the_formulas(ring, backend):
    """Prompts that hold their own answers, so that the n-grams of a text propose what comes."""
    prompt, ids = ring.expected[17]
    repeated = prompt + ids + prompt
    core = make_core(ring.folder, linear_backend=backend, speculative_tokens=7)
    expected = ring.reference.greedy(repeated, 2 * NUM_TOKENS)
    assert answer(core, repeated, max_tokens=2 * NUM_TOKENS).token_ids == expected
    core.scheduler.speculation._propose = lambda each, count: proposals(expected, each, count)
    assert answer(core, repeated, max_tokens=2 * NUM_TOKENS, prefix_cache=False).token_ids == expected
    stats = core.stats()
    assert 0 < stats.accepted_tokens_total < stats.draft_tokens_total


def proposals(text: list[int], each: Any, count: int) -> list[int]:
    """What comes next, with every fifth token of the answer wrong."""
    if not each.may_draft or count <= 0:
        return []
    known = each.num_output_tokens - each.ends_in_unseen
    return [token if (known + i) % 5 else (token + 1) % 250 for i, token in enumerate(text[known : known + count])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_siblings_are_answered_by_the_formulas(ring, backend):
    prompt, ids = ring.expected[65]
    first = request("0", prompt, num_siblings=2, max_tokens=NUM_TOKENS)
    others = [request(name, prompt, sibling_of="0", max_tokens=NUM_TOKENS) for name in "12"]
    core = make_core(ring.folder, linear_backend=backend, max_num_batched_tokens=32)
    counts = computed(core)
    answers = drain(core, first, *others)
    assert [answers[name].token_ids for name in "012"] == [ids] * 3
    assert sum(counts) < 2 * len(prompt), "the prompt is computed once"


@pytest.mark.parametrize("backend", BACKENDS)
def test_session_goes_on_after_a_restart_by_the_formulas(ring, backend, tmp_path):
    settings = {"linear_backend": backend, "session_folder": tmp_path}
    prompt, ids = ring.expected[64]
    core = make_core(ring.folder, **settings)
    assert answer(core, prompt, max_tokens=NUM_TOKENS, session_id="a").token_ids == ids
    call(core, "save")
    again = make_core(ring.folder, **settings)
    call(again, "restore")
    more = prompt + ids + random_prompt(9, seed=1)
    counts = computed(again)
    assert answer(again, more, max_tokens=NUM_TOKENS).token_ids == ring.reference.greedy(more, NUM_TOKENS)
    assert sum(counts) == 1 + 9 + NUM_TOKENS - 1, "the last token of an answer is not fed"


def call(core: EngineCore, action: str) -> None:
    core.sessions.add(SessionCall("1", action, "a"))
    for _ in range(100_000):
        for done in core.sessions.advance():
            assert done.error_code is None, done.error
            return
    raise AssertionError("the call does not come to an end")


@pytest.mark.parametrize("backend", BACKENDS)
def test_interpreted_triton_kernels_answer_as_the_formulas(tmp_path, backend):
    """The kernels of a GPU by Triton's interpreter: ragged mixed batches, cut prompts, drafts."""
    pytest.importorskip("triton")
    small = {"num_hidden_layers": 2, "layer_group_size": 2, "hidden_size": 32, "num_experts": 8, "n_group": 2}
    oracle = make_oracle(tmp_path, small | {"topk_group": 1, "num_experts_per_tok": 2}, lengths=(1, 7, 8), seed=1)
    core = make_core(
        tmp_path, kernels="triton", linear_backend=backend, max_num_seqs=3, max_num_batched_tokens=10, block_size=4
    )
    answers = drain(core, *oracle.requests(max_tokens=3))
    assert {name: found.token_ids for name, found in answers.items()} == {
        str(n): ids[:3] for n, (_, ids) in oracle.expected.items()
    }
