"""RMSNorm, rotary embedding and the gated activation against plain formulas in float64."""

from __future__ import annotations

import pytest
import torch
from leyden.kernels import torch_ops, triton_ops

KERNELS = {"torch": torch_ops, "triton": triton_ops}
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
if not torch.cuda.is_available():
    BOUNDS[torch.bfloat16] = 6e-3  # Triton's interpreter truncates to bfloat16

every_kernel = pytest.mark.parametrize("backend", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def plain_norm(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@every_kernel
@every_dtype
@pytest.mark.parametrize("shape", [(1, 16), (5, 96), (3, 256), (2, 6144), (7, 3, 80), (2, 2, 3, 32)], ids=str)
def test_rms_norm_follows_its_formula(backend, dtype, shape, device, rng, assert_close):
    x = (torch.randn(*shape, generator=rng) * 3).to(device, dtype)
    weight = torch.rand(shape[-1], generator=rng).to(device, dtype)
    y = KERNELS[backend].rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    assert_close("y", y, plain_norm(x, weight, 1e-5), BOUNDS[dtype])


@every_kernel
def test_rms_norm_takes_a_view_of_heads(backend, device, rng, assert_close):
    qkv = torch.randn(5, 4, 96, generator=rng).to(device)
    weight = torch.rand(32, generator=rng).to(device)
    for view in (qkv[..., 32:64], qkv[:, 2, 64:]):
        assert_close("y", KERNELS[backend].rms_norm(view, weight, 1e-6), plain_norm(view, weight, 1e-6), 1e-6)


@every_kernel
def test_rms_norm_of_tiny_values_is_ruled_by_eps(backend, device, assert_close):
    x = torch.full((2, 64), 1e-4, device=device)
    weight = torch.ones(64, device=device)
    assert_close("y", KERNELS[backend].rms_norm(x, weight, 1e-5), plain_norm(x, weight, 1e-5), 1e-6)


@every_kernel
@every_dtype
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (3.5565588, 1.0), (1.0, 0.25)])
def test_add_rms_norm_returns_the_weighted_sum_and_its_norm(backend, dtype, alpha, beta, device, rng, assert_close):
    x, residual = torch.randn(2, 5, 144, generator=rng).to(device, dtype)
    weight = torch.rand(144, generator=rng).to(device, dtype)
    kept = x.clone(), residual.clone()
    y, h = KERNELS[backend].add_rms_norm(x, residual, weight, 1e-5, alpha, beta)
    assert y.dtype == h.dtype == dtype
    assert_close("h", h, alpha * residual.double() + beta * x.double(), BOUNDS[dtype])
    assert_close("y", y, plain_norm(h, weight, 1e-5), BOUNDS[dtype])
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@every_kernel
@every_dtype
@pytest.mark.parametrize(("D", "R"), [(16, 8), (64, 32), (128, 64), (96, 96), (80, 20)])
def test_rope_turns_the_first_channels_in_pairs_and_keeps_the_rest(backend, dtype, D, R, device, rng, assert_close):
    T, heads, kv_heads = 5, 3, 2
    qkv = torch.randn(T, heads + kv_heads, 3 * D, generator=rng).to(device, dtype)
    q, k = qkv[:, :heads, :D], qkv[:, heads:, D : 2 * D]
    positions = torch.tensor([0, 7, 1, 499, 0], device=device)
    angles = torch.arange(500)[:, None] * 10000.0 ** (-torch.arange(0, R, 2) / R)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).to(device)
    expected = qkv.double().clone()
    cos, sin = (x.double()[positions][:, None] for x in cos_sin.chunk(2, -1))
    for x in (expected[:, :heads, :D], expected[:, heads:, D : 2 * D]):
        first, second = x[..., : R // 2].clone(), x[..., R // 2 : R].clone()
        x[..., : R // 2] = first * cos - second * sin
        x[..., R // 2 : R] = second * cos + first * sin
    kept = qkv.clone()
    KERNELS[backend].apply_rope(q, k, positions, cos_sin)
    assert_close("q and k", qkv, expected, BOUNDS[dtype])
    for now, before in ((q, kept[:, :heads, :D]), (k, kept[:, heads:, D : 2 * D])):
        assert torch.equal(now[..., R:], before[..., R:])
        assert torch.equal(now[0], before[0])  # position 0 does not turn
    assert torch.equal(qkv[..., 2 * D :], kept[..., 2 * D :])


@every_kernel
@every_dtype
@pytest.mark.parametrize("shape", [(1, 2), (3, 100), (2, 640), (2, 5000)], ids=str)
def test_silu_and_mul_follows_its_formula(backend, dtype, shape, device, rng, assert_close):
    x = (torch.randn(*shape, generator=rng) * 4).to(device, dtype)
    kept = x.clone()
    gate, up = x.double().chunk(2, -1)
    y = KERNELS[backend].silu_and_mul(x)
    assert y.dtype == dtype
    assert_close("y", y, gate * torch.sigmoid(gate) * up, BOUNDS[dtype])
    assert torch.equal(x, kept)


@every_kernel
def test_silu_of_a_very_negative_gate_is_zero(backend, device):
    x = torch.tensor([[-200.0, -1e4, 3.0, 3.0]], device=device)
    assert torch.equal(KERNELS[backend].silu_and_mul(x), torch.zeros(1, 2, device=device))


@pytest.mark.gpu
def test_no_kernel_synchronises_with_the_host(device):
    x = torch.randn(4, 128, device=device)
    weight = torch.ones(128, device=device)
    q = torch.randn(4, 2, 32, device=device)
    positions = torch.arange(4, device=device)
    cos_sin = torch.randn(4, 16, device=device)

    def everything() -> None:
        triton_ops.rms_norm(x, weight, 1e-5)
        triton_ops.add_rms_norm(x, x, weight, 1e-5, 1.0, 1.0)
        triton_ops.apply_rope(q, q, positions, cos_sin)
        triton_ops.silu_and_mul(x)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
