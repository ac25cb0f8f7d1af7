"""Ring-linear-2.0: its answers are those of the formulas, however a batch is cut, and what is not served is refused."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from backends import BACKENDS
from engines import DEVICE, answer, call_session, computed, drain, request
from leyden.engine.errors import CheckpointError
from leyden.engine.scheduling.speculation import can_draft
from leyden.kernels import load
from leyden.models.families.registry import from_hf, read_config
from leyden.models.layers.build import Build
from leyden.models.layers.router import build_router
from leyden.models.loading.noise import fill_with_noise
from leyden.models.specs import (
    DenseSpec,
    ExpertsSpec,
    LightningSpec,
    NormSpec,
    RopeSpec,
    SharedSpec,
    SigmoidGroupRoute,
    SoftmaxSpec,
)
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


# On the GPU where there is one. It would compile the kernels anew for each variant, so that these stay on the CPU.
make_core = functools.partial(engines.make_core, device=DEVICE)


# -- equal to the formulas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_answer_alone_is_that_of_the_formulas(variant, backend):
    core = engines.make_core(variant.folder, linear_backend=backend)
    for each in variant.requests():  # one after another: slots are reused, and dirty
        variant.check(drain(core, each))


@pytest.mark.parametrize(("backend", "chunk"), [*product(BACKENDS, [7, 33]), ("auto", 256)])
def test_answers_in_ragged_mixed_batches_are_those_of_the_formulas(variant, backend, chunk):
    core = engines.make_core(variant.folder, linear_backend=backend, max_num_batched_tokens=chunk, max_num_seqs=6)
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
    if not can_draft(each.sampling_params) or count <= 0:
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
    call_session(core, "save")
    again = make_core(ring.folder, **settings)
    call_session(again, "restore")
    more = prompt + ids + random_prompt(9, seed=1)
    counts = computed(again)
    assert answer(again, more, max_tokens=NUM_TOKENS).token_ids == ring.reference.greedy(more, NUM_TOKENS)
    assert sum(counts) == 1 + 9 + NUM_TOKENS - 1, "the last token of an answer is not fed"


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


# -- what is read, and what is refused ---------------------------------------------------------------------------

RELEASED = Path(__file__).parents[3] / "benchmarks" / "configs" / "ring-mini"


def test_released_config_in_normal_form():
    """config.json of Ring-mini-linear-2.0, and the stop ids of Ring's generation_config.json."""
    spec = read_config(RELEASED)
    assert (spec.hidden_size, spec.vocab_size, spec.max_model_len) == (2048, 157184, 131072)
    assert (spec.postnorm, spec.tie_word_embeddings, spec.norm.eps, spec.dtype) == (False, False, 1e-6, "bfloat16")
    assert [i for i, layer in enumerate(spec.layers) if isinstance(layer.mixer, SoftmaxSpec)] == [4, 9, 14, 19]
    lightning, softmax = spec.layers[1].mixer, spec.layers[4].mixer
    assert isinstance(lightning, LightningSpec)
    assert (lightning.num_heads, lightning.head_dim, lightning.scale) == (16, 128, 128**-0.5)
    assert (lightning.norm_groups, lightning.has_silu, lightning.is_interleaved) == (4, False, False)
    assert lightning.rope == softmax.rope == RopeSpec(64, 1e6)
    assert lightning.qk_norm == softmax.qk_norm == NormSpec(1e-6)
    assert (softmax.num_heads, softmax.num_kv_heads, softmax.head_dim, softmax.is_fused) == (16, 4, 128, True)
    assert spec.layers[0].mlp == DenseSpec(5120) and spec.layers[0].shared is None
    for layer in spec.layers[1:]:
        assert layer.mlp == ExpertsSpec(512, 256, 8, SigmoidGroupRoute(num_groups=8, num_kept=4, scale=2.5))
        assert layer.shared == SharedSpec(512, "added")


def test_stop_ids_are_those_of_both_files(tmp_path):
    (tmp_path / "config.json").write_text((RELEASED / "config.json").read_text())
    assert read_config(tmp_path).eos_token_ids == (156892,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [156892, 156895]}))
    assert read_config(tmp_path).eos_token_ids == (156892, 156895)


@pytest.mark.parametrize(("offset", "first", "last"), [(0, 1 + 1e-5, 1e-5), (1, 1 + 1 / 5 + 1e-5, 1 / 5 + 1e-5)])
def test_layers_forget_less_and_less_from_the_offset_on(offset, first, last):
    fields = TINY | {"slope_layer_offset": offset, "num_attention_heads": 6, "num_key_value_heads": 3}
    slopes = [layer.mixer.slopes for layer in from_hf(fields).layers if isinstance(layer.mixer, LightningSpec)]
    base = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]  # ALiBi of 6 heads: of 4, then every other of 8
    assert slopes[0] == pytest.approx([first * slope for slope in base])
    assert slopes[-1] == pytest.approx([(last + 1 / 5) * slope for slope in base]), (
        "layer 4 of 6 is the last of its kind"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_bias": True}, "use_bias = True is not supported"),
        ({"use_qkv_bias": True}, "use_qkv_bias = True"),
        ({"linear_silu": True}, "linear_silu = True"),
        ({"use_linear_silu": True}, "use_linear_silu = True"),
        ({"linear_rope": False}, "linear_rope = False"),
        ({"score_function": "softmax"}, "score_function = 'softmax'"),
        ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias = False"),
        ({"moe_router_enable_shared_expert": False}, "moe_router_enable_shared_expert = False"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"norm_head": True}, "norm_head = True"),
        ({"norm_softmax": True}, "norm_softmax = True"),
        ({"use_rmsnorm": False}, "use_rmsnorm = False"),
        ({"router_dtype": "bf16"}, "router_dtype = 'bf16'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling = "),
        ({"rope_traditional": True}, "rope_traditional = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1"),
        ({"slope_layer_offset": 2}, "slope_layer_offset = 2 is not supported (supported: 0, 1)"),
        ({"use_qk_norm": None}, "use_qk_norm is missing"),
        ({"layer_group_size": 9}, "no linear layer"),
        ({"layer_group_size": 0}, "layer_group_size must be positive"),
        ({"group_norm_size": 5}, "group_norm_size (5) must divide num_attention_heads * head_dim (64)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads (3) must divide num_attention_heads (4)"),
        ({"n_group": 3}, "n_group (3) must divide num_experts (16)"),
        ({"topk_group": 5}, "topk_group (5) exceeds n_group (4)"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok (9) exceeds the 8 experts of topk_group (2)"),
        ({"partial_rotary_factor": 0.05}, "rotary_dim must be positive, got 0"),
        ({"partial_rotary_factor": 2.0}, "rotary_dim must be even and at most head_dim (16), got 32"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be positive"),
    ],
    ids=str,
)
def test_field_that_cannot_be_honoured_is_refused_by_its_name(changes, words):
    with pytest.raises(CheckpointError) as refusal:
        from_hf(TINY | changes)
    assert words in str(refusal.value)


# -- names of tensors --------------------------------------------------------------------------------------------


def tiny_tensors() -> dict[str, torch.Tensor]:
    return make_tensors(TINY | {"num_hidden_layers": 3})


def refusal_of(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    save(folder, TINY | {"num_hidden_layers": 3}, tensors)
    with pytest.raises(CheckpointError) as refusal:
        make_core(folder)
    return str(refusal.value)


@pytest.mark.parametrize("name", sorted(name for name in tiny_tensors() if ".experts.1" not in name))
def test_missing_tensor_is_named_as_files_spell_it(tmp_path, name):
    tensors = tiny_tensors()
    shape = list(tensors.pop(name).shape)
    assert refusal_of(tmp_path, tensors).endswith(f"missing tensors: {name} {shape}")


@pytest.mark.parametrize(
    "name", ["layers.0.attention.g_norm", "layers.2.attention.query_key_value", "layers.1.mlp.gate"]
)
def test_misshapen_tensor_is_named_as_files_spell_it(tmp_path, name):
    tensors = tiny_tensors()
    asked = list(tensors[f"model.{name}.weight"].shape)
    tensors[f"model.{name}.weight"] = torch.zeros(7, 5)
    words = f"tensor model.{name}.weight has shape [7, 5], the config asks for {asked}"
    assert words in refusal_of(tmp_path, tensors)


def test_tensor_that_no_layer_wants_is_refused(tmp_path):
    """A softmax layer has no gate."""
    extra = {"model.layers.2.attention.g_proj.weight": torch.zeros(64, 48)}
    assert "unexpected tensor model.layers.2.attention.g_proj.weight" in refusal_of(tmp_path, tiny_tensors() | extra)


def test_fused_matrix_of_a_softmax_layer_does_not_fit_a_lightning_layer(tmp_path):
    tensors = tiny_tensors()
    name = "model.layers.0.attention.query_key_value.weight"
    tensors[name] = tensors["model.layers.2.attention.query_key_value.weight"].clone()
    assert f"tensor {name} has shape [128, 48], the config asks for [192, 48]" in refusal_of(tmp_path, tensors)


def test_random_weights_spread_tokens_over_all_experts():
    """A bias that is alike for all experts chooses nothing: `load_format: dummy` measures a real step."""
    spec = read_config(RELEASED)
    build = Build(load("torch"), torch.device("cpu"), torch.float32)
    router = build_router(spec.hidden_size, spec.layers[1].mlp, build)
    fill_with_noise(router.parameters())
    x = torch.randn(2048, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    weights, experts = router(x)
    counts = torch.bincount(experts.flatten(), minlength=256)
    assert counts.min() > 0.3 * counts.float().mean() and counts.max() < 3 * counts.float().mean()
    torch.testing.assert_close(weights.sum(-1), torch.full((2048,), 2.5))
