"""The mixture of experts against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from leyden.kernels import torch_ops, triton_ops

ON_GPU = torch.cuda.is_available()
KERNELS = {"torch": torch_ops, "triton": triton_ops}
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}

every_kernel = pytest.mark.parametrize("backend", KERNELS)


def make_case(device, rng, T, *, d=48, F=40, E=4, top_k=2, dtype=torch.float32):
    x = torch.randn(T, d, generator=rng).to(device, dtype)
    gate_up = (torch.randn(E, 2 * F, d, generator=rng) * d**-0.5).to(device, dtype)
    down = (torch.randn(E, d, F, generator=rng) * F**-0.5).to(device, dtype)
    weights, experts = torch.rand(T, E, generator=rng).topk(top_k, dim=-1)
    return x, gate_up, down, weights.to(device), experts.to(device)


def plain_moe(x, gate_up, down, weights, experts):
    x, gate_up, down = (t.double() for t in (x, gate_up, down))
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(weights[t].tolist(), experts[t].tolist(), strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            y[t] += weight * (down[e] @ (gate * gate.sigmoid() * up))
    return y


@every_kernel
@pytest.mark.parametrize("T", [1, 2, 8, 33, *([300] if ON_GPU else [])])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_token_is_the_weighted_sum_of_its_experts(backend, T, top_k, device, rng, assert_close):
    case = make_case(device, rng, T, top_k=top_k)
    assert_close("y", KERNELS[backend].moe(*case), plain_moe(*case), 1e-6)


@every_kernel
@pytest.mark.parametrize(("d", "F", "E", "top_k"), [(16, 16, 1, 1), (100, 30, 7, 3), (64, 80, 32, 8)])
def test_any_sizes(backend, d, F, E, top_k, device, rng, assert_close):
    case = make_case(device, rng, 9 if ON_GPU else 3, d=d, F=F, E=E, top_k=top_k)
    assert_close("y", KERNELS[backend].moe(*case), plain_moe(*case), 1e-6)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 40])
def test_half_precision_stays_in_its_error_bound(backend, dtype, T, device, rng, assert_close):
    if backend == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter has no bfloat16 dot")
    case = make_case(device, rng, T, dtype=dtype)
    y = KERNELS[backend].moe(*case)
    assert y.dtype == dtype
    assert_close("y", y, plain_moe(*case), BOUNDS[dtype])


@every_kernel
def test_one_expert_takes_every_token_and_unused_experts_are_not_read(backend, device, rng, assert_close):
    x, gate_up, down, weights, experts = make_case(device, rng, 70, top_k=1)
    experts.fill_(2)
    expected = plain_moe(x, gate_up, down, weights, experts)
    for e in (0, 1, 3):
        gate_up[e] = down[e] = float("nan")
    assert_close("y", KERNELS[backend].moe(x, gate_up, down, weights, experts), expected, 1e-6)


@every_kernel
def test_a_token_does_not_depend_on_its_neighbours(backend, device, rng, assert_close):
    x, gate_up, down, weights, experts = make_case(device, rng, 20)
    together = KERNELS[backend].moe(x, gate_up, down, weights, experts)
    for t in (0, 7, 19):
        one = slice(t, t + 1)
        alone = KERNELS[backend].moe(x[one], gate_up, down, weights[one], experts[one])
        assert_close(f"token {t}", together[one], alone, 1e-6)


@every_kernel
def test_the_sum_over_experts_is_deterministic(backend, device, rng):
    case = make_case(device, rng, 50 if ON_GPU else 10, top_k=3)
    first = KERNELS[backend].moe(*case)
    assert all(torch.equal(first, KERNELS[backend].moe(*case)) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("T", [1, 64, 700])
def test_a_served_shape_stays_in_its_error_bound(dtype, T, device, rng, assert_close):
    case = make_case(device, rng, T, d=512, F=384, E=32, top_k=8, dtype=dtype)
    assert_close("y", triton_ops.moe(*case), plain_moe(*case), BOUNDS[dtype])


@pytest.mark.gpu
def test_it_never_synchronises_and_can_be_captured(device, rng, assert_close):
    case = make_case(device, rng, 20, top_k=2)
    triton_ops.moe(*case)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_ops.moe(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = triton_ops.moe(*case)
    case[4].copy_(torch.rand(20, 4, generator=rng).topk(2)[1])
    graph.replay()
    assert_close("y", y, plain_moe(*case), 1e-6)
