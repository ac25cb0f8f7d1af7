"""The mixture of experts against its definition in float64, and how tokens come to their experts."""

from __future__ import annotations

import pytest
import torch
from leyden.kernels import load
from leyden.kernels.bundles import Weight
from leyden.kernels.experts.routing import sort_pairs

ON_GPU = torch.cuda.is_available()
KERNELS = {name: load(name).experts for name in ("torch", "triton")}
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}

every_kernel = pytest.mark.parametrize("backend", KERNELS)


def make_case(device, rng, T, *, d=48, F=40, E=4, top_k=2, dtype=torch.float32):
    x = torch.randn(T, d, generator=rng).to(device, dtype)
    gate_up = (torch.randn(E, 2 * F, d, generator=rng) * d**-0.5).to(device, dtype)
    down = (torch.randn(E, d, F, generator=rng) * F**-0.5).to(device, dtype)
    weights, experts = torch.rand(T, E, generator=rng).topk(top_k, dim=-1)
    return x, gate_up, down, weights.to(device), experts.to(device)


def moe(backend, x, gate_up, down, weights, experts):
    return KERNELS[backend].moe(x, Weight(gate_up), Weight(down), weights, experts)


def plain_moe(x, gate_up, down, weights, experts):
    x, gate_up, down = (t.double() for t in (x, gate_up, down))
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(weights[t].tolist(), experts[t].tolist(), strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            y[t] += weight * (down[e] @ (gate * gate.sigmoid() * up))
    return y


@every_kernel
@pytest.mark.parametrize(("T", "E", "top_k"), [(1, 1, 1), (1, 8, 8), (9, 7, 3), (70, 64, 4), (5, 256, 8)])
def test_a_token_takes_its_most_likely_experts(backend, T, E, top_k, device, rng, assert_close):
    logits = torch.randn(T, E, generator=rng).to(device) * 3
    weights, experts = KERNELS[backend].route(logits, top_k)
    expected, chosen = logits.double().softmax(dim=-1).topk(top_k, dim=-1)
    assert experts.dtype == torch.int64
    assert torch.equal(experts, chosen)
    assert_close("weights", weights, expected / expected.sum(dim=-1, keepdim=True), 1e-6)


@every_kernel
def test_a_token_with_enormous_logits_has_finite_weights(backend, device):
    weights, experts = KERNELS[backend].route(torch.tensor([[-3e38, 1e4, 3e38, 0.0]], device=device), 3)
    assert experts.tolist() == [[2, 1, 3]]
    assert weights.tolist() == [[1.0, 0.0, 0.0]]


@every_kernel
def test_equal_experts_are_chosen_alike_for_every_token(backend, device):
    logits = torch.zeros(20, 9, device=device)
    logits[:, [2, 4, 5, 7]] = 1.0
    weights, experts = KERNELS[backend].route(logits, 3)
    assert (experts == experts[0]).all()
    assert {2, 4, 5, 7} > set(experts[0].tolist())
    assert len(set(experts[0].tolist())) == 3
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3))


# (E, groups, kept groups, k): Ring-mini, Ling-3, one group, groups of one, sizes that are no powers of two
GROUPS = [(256, 8, 4, 8), (512, 8, 4, 8), (64, 1, 1, 6), (8, 8, 3, 3), (30, 5, 2, 7), (12, 3, 3, 1), (2, 1, 1, 2)]


def check_groups(choice, scores, weights, experts, num_groups, top_groups, scale):
    """That weights and experts [T, k] are a right answer to float64 choice and scores [T, E]; of equal ones any is."""
    groups = choice.unflatten(-1, (num_groups, -1))
    group_scores = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
    for t in range(len(choice)):
        chosen = experts[t].tolist()
        assert len(set(chosen)) == len(chosen)
        picked = choice[t, experts[t]]
        assert (picked.diff() <= 0).all(), "largest first"
        bound = group_scores[t].topk(top_groups).values[-1]
        groups_of = {e // groups.shape[-1] for e in chosen}
        assert all(group_scores[t, n] >= bound for n in groups_of) and len(groups_of) <= top_groups
        certain = (group_scores[t] > bound).repeat_interleave(groups.shape[-1])  # groups that must be kept
        certain[experts[t]] = False
        assert not (choice[t, certain] > picked[-1]).any(), "a better expert was left"
        expected = scores[t, experts[t]]
        torch.testing.assert_close(weights[t].double(), expected / expected.sum() * scale, rtol=1e-6, atol=0)


@every_kernel
@pytest.mark.parametrize(("E", "num_groups", "top_groups", "top_k"), GROUPS)
@pytest.mark.parametrize("T", [1, 5, 300])
def test_a_token_takes_the_best_experts_of_its_best_groups(backend, E, num_groups, top_groups, top_k, T, device, rng):
    wide = torch.randn(T, E + 3, generator=rng) * 2
    bias = torch.randn(E, generator=rng) * 0.1
    scores = wide[:, :E].double().sigmoid()
    logits = wide.to(device)[:, :E]
    weights, experts = KERNELS[backend].route_groups(logits, bias.to(device), top_k, num_groups, top_groups, 2.5)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int64
    choice = (scores + bias.double()).float().double()  # what float32 cannot tell apart is equal
    check_groups(choice, scores, weights.cpu(), experts.cpu(), num_groups, top_groups, 2.5)


@every_kernel
@pytest.mark.parametrize(("E", "num_groups", "top_groups", "top_k"), GROUPS)
def test_of_equal_experts_and_groups_any_is_right(backend, E, num_groups, top_groups, top_k, device, rng):
    logits = torch.randint(0, 3, (20, E), generator=rng).float()
    logits[0], logits[1] = 0.0, 100.0  # all alike; all at the end of the sigmoid's range
    bias = torch.randint(0, 2, (E,), generator=rng) * 0.25
    answer = KERNELS[backend].route_groups(logits.to(device), bias.to(device), top_k, num_groups, top_groups, 1.0)
    scores = logits.sigmoid()  # float32, where equal logits have equal scores
    check_groups((scores + bias).double(), scores.double(), *(x.cpu() for x in answer), num_groups, top_groups, 1.0)


@every_kernel
def test_a_bias_chooses_and_weighs_nothing(backend, device):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], device=device)
    bias = torch.tensor([-10.0, 0.0, 0.0, 10.0], device=device)
    weights, experts = KERNELS[backend].route_groups(logits, bias, 2, 1, 1, 1.0)
    assert experts.tolist() == [[3, 1]]
    expected = torch.sigmoid(torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(weights[0].cpu(), expected / expected.sum())


@every_kernel
def test_experts_worse_than_nothing_are_chosen_all_the_same(backend, device):
    """All choices below zero: places of a tile without an expert, and experts outside the groups, must lie below."""
    bias = torch.tensor([-5.0, -5.0, -3.0, -9.0, -4.0, -4.5], device=device)
    logits = torch.zeros(1, 6, device=device)
    _, experts = KERNELS[backend].route_groups(logits, bias, 2, 3, 1, 1.0)
    assert experts.tolist() == [[4, 5]]  # -8.5 is more than -10 and -12
    _, experts = KERNELS[backend].route_groups(logits, bias, 3, 2, 2, 1.0)
    assert experts.tolist() == [[2, 4, 5]]


def test_a_token_of_nan_takes_experts_that_exist(device):
    logits = torch.full((3, 5), float("nan"), device=device)
    logits[1] = torch.arange(5.0)
    weights, experts = KERNELS["triton"].route(logits, 2)
    assert ((experts >= 0) & (experts < 5)).all()
    assert experts[1].tolist() == [4, 3]
    assert weights.isfinite().all(dim=-1).tolist() == [False, True, False]


def test_no_token_has_no_experts(device):
    assert [t.shape for t in KERNELS["triton"].route(torch.empty(0, 4, device=device), 2)] == [(0, 2), (0, 2)]


# pairs of each expert; a block holds 16
COUNTS = {
    "one pair": [1],
    "one expert": [50],
    "awkward": [0, 1, 16, 17, 0, 15, 32, 0],
    "all on one of many": [0] * 7 + [300] + [0] * 3,
    "only the last of 256": [0] * 255 + [2],
    "a few of 256": [0, 1, 3] * 85 + [140],
    "many chunks": [700, 0, 129, 1, 511],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_pairs_are_sorted_stably_and_cut_into_blocks_of_one_expert(counts, device, rng):
    experts = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)])
    experts = experts[torch.randperm(len(experts), generator=rng)]
    order, blocks = sort_pairs(experts[:, None].to(device), len(counts), 16)
    assert torch.equal(order.cpu().long(), experts.argsort(stable=True))
    expected = []
    for e, n in enumerate(counts):
        start = sum(counts[:e])
        expected += [[e, first, min(first + 16, start + n)] for first in range(start, start + n, 16)]
    assert blocks.tolist()[: len(expected)] == expected
    assert (blocks[len(expected) :, 0] == -1).all()


@every_kernel
@pytest.mark.parametrize("T", [1, 2, 8, 33, *([300] if ON_GPU else [])])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_token_is_the_weighted_sum_of_its_experts(backend, T, top_k, device, rng, assert_close):
    case = make_case(device, rng, T, top_k=top_k)
    assert_close("y", moe(backend, *case), plain_moe(*case), 1e-6)


@every_kernel
@pytest.mark.parametrize(("d", "F", "E", "top_k"), [(16, 16, 1, 1), (100, 30, 7, 3), (64, 80, 32, 8)])
def test_any_sizes(backend, d, F, E, top_k, device, rng, assert_close):
    for T in (1, 9 if ON_GPU else 3):
        case = make_case(device, rng, T, d=d, F=F, E=E, top_k=top_k)
        assert_close(f"y of {T}", moe(backend, *case), plain_moe(*case), 1e-6)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 40])
def test_half_precision_stays_in_its_error_bound(backend, dtype, T, device, rng, assert_close):
    if backend == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter has no bfloat16 dot")
    case = make_case(device, rng, T, dtype=dtype)
    y = moe(backend, *case)
    assert y.dtype == dtype
    assert_close("y", y, plain_moe(*case), BOUNDS[dtype])


@every_kernel
@pytest.mark.parametrize("counts", [[0, 1, 16, 17], [65, 0, 0, 0], [0, 0, 63, 64]], ids=str)
def test_experts_of_any_number_of_tokens(backend, counts, device, rng, assert_close):
    x, gate_up, down, weights, _ = make_case(device, rng, sum(counts), top_k=1)
    experts = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)])
    experts = experts[torch.randperm(len(experts), generator=rng)][:, None].to(device)
    case = x, gate_up, down, weights, experts
    assert_close("y", moe(backend, *case), plain_moe(*case), 1e-6)


@every_kernel
def test_rows_may_be_slices_of_something_wider(backend, device, rng, assert_close):
    x, gate_up, down, weights, experts = make_case(device, rng, 5)
    wide = torch.cat([x, x + 1], dim=1)[:, : x.shape[1]]
    for T in (1, 5):
        case = wide[:T], gate_up, down, weights[:T], experts[:T]
        assert_close(f"y of {T}", moe(backend, *case), plain_moe(*case), 1e-6)


@every_kernel
def test_one_expert_takes_every_token_and_unused_experts_are_not_read(backend, device, rng, assert_close):
    x, gate_up, down, weights, experts = make_case(device, rng, 70, top_k=1)
    experts.fill_(2)
    expected = plain_moe(x, gate_up, down, weights, experts)
    for e in (0, 1, 3):
        gate_up[e] = down[e] = float("nan")
    assert_close("y", moe(backend, x, gate_up, down, weights, experts), expected, 1e-6)


@every_kernel
def test_a_token_does_not_depend_on_its_neighbours(backend, device, rng, assert_close):
    x, gate_up, down, weights, experts = make_case(device, rng, 20)
    together = moe(backend, x, gate_up, down, weights, experts)
    for t in (0, 7, 19):
        one = slice(t, t + 1)
        alone = moe(backend, x[one], gate_up, down, weights[one], experts[one])
        assert_close(f"token {t}", together[one], alone, 1e-6)


@every_kernel
def test_the_sum_over_experts_is_deterministic(backend, device, rng):
    case = make_case(device, rng, 50 if ON_GPU else 10, top_k=3)
    first = moe(backend, *case)
    assert all(torch.equal(first, moe(backend, *case)) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("T", [1, 4, 64, 130, 700, 2000])
def test_a_served_shape_stays_in_its_error_bound(dtype, T, device, rng, assert_close):
    case = make_case(device, rng, T, d=512, F=384, E=32, top_k=8, dtype=dtype)
    assert_close("y", moe("triton", *case), plain_moe(*case), BOUNDS[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 100, 300, 1000, 8192])
def test_a_large_shape_stays_in_its_error_bound(T, device, assert_close):
    """Against matrix products of whole experts: `plain_moe` would take minutes."""
    rng = torch.Generator(device).manual_seed(0)
    d, F, E, top_k = 2048, 1408, 64, 4
    x = torch.randn(T, d, generator=rng, device=device).bfloat16()
    gate_up = (torch.randn(E, 2 * F, d, generator=rng, device=device) * d**-0.5).bfloat16()
    down = (torch.randn(E, d, F, generator=rng, device=device) * F**-0.5).bfloat16()
    weights, experts = KERNELS["triton"].route(torch.randn(T, E, generator=rng, device=device), top_k)
    expected = torch.zeros(T, d, device=device)
    for e in range(E):
        token, j = (experts == e).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ gate_up[e].float().T).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ down[e].float().T
        expected.index_add_(0, token, weights[token, j, None] * y)
    assert_close("y", moe("triton", x, gate_up, down, weights, experts), expected, BOUNDS[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 20, 200])
def test_it_never_synchronises_and_can_be_captured(T, device, rng, assert_close):
    case = make_case(device, rng, T, top_k=2)
    logits = torch.randn(T, 4, device=device)
    moe("triton", *case), KERNELS["triton"].route(logits, 2)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe("triton", *case), KERNELS["triton"].route(logits, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe("triton", *case)
    case[4].copy_(torch.rand(T, 4, generator=rng).topk(2)[1])
    graph.replay()
    assert_close("y", y, plain_moe(*case), 1e-6)
