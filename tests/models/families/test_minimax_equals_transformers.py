"""Token-for-token equality with transformers in float32, greedy, for every way a batch can be cut and mixed."""

from __future__ import annotations

import pytest
from backends import BACKENDS
from leyden.configs.schema import EngineConfig
from leyden.engine.core import EngineCore
from leyden.engine.messages import AddRequest
from leyden.engine.sampling_params import SamplingParams
from tiny_models import FULL_FIRST, LINEAR_FIRST, greedy, random_prompt, save_minimax

NUM_TOKENS = 24
LENGTHS = (1, 2, 17, 64, 65, 130, 300)
SHAPES = {
    "4 heads, linear first": (4, LINEAR_FIRST),
    "4 heads, full first": (4, FULL_FIRST),
    "6 heads, linear first": (6, LINEAR_FIRST),  # no power of two: Hugging Face's own slopes
    "6 heads, full first": (6, FULL_FIRST),
    "8 heads, linear first": (8, LINEAR_FIRST),
    "8 heads, full first": (8, FULL_FIRST),
}

SHAPES_ON_GPU = [SHAPES["4 heads, linear first"], SHAPES["6 heads, full first"]]


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def checkpoint(request, tmp_path_factory):
    """(folder, {prompt length: (prompt, expected answer)})."""
    heads, layer_types = request.param
    folder = tmp_path_factory.mktemp("minimax")
    model = save_minimax(folder, heads=heads, layer_types=layer_types, seed=heads)
    prompts = {n: random_prompt(n, seed=n) for n in LENGTHS}
    expected = {n: (p, greedy(model, p, NUM_TOKENS)) for n, p in prompts.items()}
    assert all(len(set(answer)) > 8 for _, answer in expected.values()), "a constant answer proves nothing"
    return folder, expected


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """PyTorch kernels on a CPU, Triton's on a GPU: there for two of the shapes, since float32 takes minutes to compile
    for each (`tests/kernels` has every number of heads on a GPU)."""
    if request.param == "cuda" and request.node.callspec.params["checkpoint"] not in SHAPES_ON_GPU:
        pytest.skip("another shape runs on the GPU")
    return request.param


def make_core(folder, device=device, **settings) -> EngineCore:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "cpu_memory_gb": 0.1, "num_kv_blocks": 512}
    defaults["max_num_batched_tokens"] = 512  # prompts have 300; a GPU would compile for more
    return EngineCore(EngineConfig(model=str(folder), **(defaults | settings)), progress=False)


def run(core: EngineCore, prompts: dict[str, list[int]], num_tokens: int = NUM_TOKENS) -> dict[str, list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    for name, prompt in prompts.items():
        core.add_request(AddRequest(request_id=name, prompt_token_ids=prompt, sampling_params=params))
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    while core.has_work:
        for output in core.step():
            answers[output.request_id] += output.token_ids
        core.check_integrity()
    assert core.stats().state_slots_used == core.stats().kv_blocks_used == 0
    return answers


@pytest.mark.parametrize("backend", BACKENDS)
def test_alone(checkpoint, backend, device):
    folder, expected = checkpoint
    core = make_core(folder, device=device, linear_backend=backend)
    for n, (prompt, answer) in expected.items():  # one after another: slots are reused, and dirty
        assert run(core, {"x": prompt})["x"] == answer, f"prompt of {n}"


@pytest.mark.parametrize(
    ("chunk", "backend"),
    [(7, "minimax"), (7, "seg_la"), (7, "replay"), (64, "minimax"), (64, "seg_la"), (257, "minimax"), (257, "seg_la")],
)
def test_ragged_mixed_batches_with_chunked_prompts(checkpoint, backend, chunk, device):
    folder, expected = checkpoint
    core = make_core(folder, device=device, linear_backend=backend, max_num_batched_tokens=chunk, max_num_seqs=7)
    for _ in range(1 if chunk == 7 else 2):  # the second round finds every slot and block used
        answers = run(core, {str(n): prompt for n, (prompt, _) in expected.items()})
        assert answers == {str(n): answer for n, (_, answer) in expected.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompt_fed_one_token_at_a_time(checkpoint, backend, device):
    folder, expected = checkpoint
    core = make_core(folder, device=device, linear_backend=backend, max_num_batched_tokens=1, max_num_seqs=1)
    prompt, answer = expected[65]
    assert run(core, {"x": prompt})["x"] == answer


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_preemption(checkpoint, backend, device):
    folder, expected = checkpoint
    lengths = (17, 64, 65, 130)
    core = make_core(
        folder, device=device, linear_backend=backend, num_kv_blocks=21, block_size=16, max_num_batched_tokens=64
    )
    answers = run(core, {str(n): expected[n][0] for n in lengths})
    assert core.stats().preemptions_total > 0
    assert answers == {str(n): expected[n][1] for n in lengths}


def test_neighbours_that_come_and_go_do_not_matter(checkpoint, device):
    folder, expected = checkpoint
    core = make_core(folder, device=device, max_num_batched_tokens=32, max_num_seqs=3)
    prompt, answer = expected[130]
    greedy_params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    noisy = SamplingParams(temperature=1.0, max_tokens=5)
    core.add_request(AddRequest(request_id="x", prompt_token_ids=prompt, sampling_params=greedy_params))
    got: list[int] = []
    for step in range(200):
        if step % 3 == 0:
            other = AddRequest(
                request_id=f"n{step}", prompt_token_ids=random_prompt(1 + step % 9, step), sampling_params=noisy
            )
            core.add_request(other)
        if step % 5 == 4:
            core.abort_request(f"n{step - step % 3}")
        for output in core.step():
            if output.request_id == "x":
                got += output.token_ids
        core.check_integrity()
        if len(got) == NUM_TOKENS:
            break
    assert got == answer


@pytest.mark.parametrize(
    ("backend", "heads", "layer_types"),
    [
        pytest.param("minimax", 4, LINEAR_FIRST[1:3], marks=pytest.mark.slow),  # Ring's tests run these two by default
        pytest.param("seg_la", 4, FULL_FIRST[:2], marks=pytest.mark.slow),
        ("replay", 4, LINEAR_FIRST[1:3]),
    ],
)
def test_interpreted_triton_kernels(tmp_path, backend, heads, layer_types):
    """The kernels of a GPU, run by Triton's interpreter: alone, in ragged mixed batches, cut prompts, preempted."""
    pytest.importorskip("triton")
    model = save_minimax(tmp_path, heads=heads, layer_types=layer_types, seed=1)
    prompts = {str(n): random_prompt(n, n) for n in (7, 8, 1)}
    expected = {name: greedy(model, prompt, 3) for name, prompt in prompts.items()}
    settings = {"kernels": "triton", "linear_backend": backend}
    alone = make_core(tmp_path, max_num_seqs=1, **settings)
    assert run(alone, prompts, num_tokens=3) == expected
    mixed = make_core(
        tmp_path, max_num_seqs=3, max_num_batched_tokens=10, block_size=4, num_kv_blocks=5, max_model_len=16, **settings
    )
    assert run(mixed, prompts, num_tokens=3) == expected
    assert mixed.stats().preemptions_total > 0
