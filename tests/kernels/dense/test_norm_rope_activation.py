"""RMSNorm, rotary embedding and the gated activation against plain formulas in float64."""

from __future__ import annotations

import pytest
import torch
from leyden.kernels import load
from leyden.kernels.bundles import HeadNorm

KERNELS = {name: load(name).dense for name in ("torch", "triton")}
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
    for w in (weight, 1.0 + weight.float()):
        y = KERNELS[backend].rms_norm(x, w, 1e-5)
        assert y.dtype == dtype
        assert_close("y", y, plain_norm(x, w, 1e-5), BOUNDS[dtype])


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
    for w in (weight, 1.0 + weight.float()):
        y, h = KERNELS[backend].add_rms_norm(x, residual, w, 1e-5, alpha, beta)
        assert y.dtype == h.dtype == dtype
        assert_close("h", h, alpha * residual.double() + beta * x.double(), BOUNDS[dtype])
        assert_close("y", y, plain_norm(h, w, 1e-5), BOUNDS[dtype])
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@every_kernel
@every_dtype
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
@pytest.mark.parametrize("is_shared", [False, True], ids=["weight per channel", "weight of a group"])
@pytest.mark.parametrize(("width", "num_groups"), [(96, 1), (96, 3), (96, 6), (2048, 1), (2048, 4), (4480, 35)])
def test_gated_rms_norm_is_the_norm_of_each_group_times_the_open_gate(
    backend, dtype, width, num_groups, is_shared, activation, device, rng, assert_close
):
    projected = (torch.randn(5, 3 * width, generator=rng) * 3).to(device, dtype)
    wide = torch.randn(5, 2 * width, generator=rng).to(device, dtype)
    wide[:, width:] *= torch.arange(1, width + 1, device=device)  # groups of different sizes of values
    x, gate = wide[:, width:], projected[:, width : 2 * width]
    weight = torch.rand(width // num_groups if is_shared else width, generator=rng).to(device, dtype)
    kept = wide.clone(), projected.clone()
    y = KERNELS[backend].gated_rms_norm(x, gate, weight, 1e-5, num_groups, activation)
    whole = weight.repeat(num_groups) if is_shared else weight
    groups = (part.unflatten(-1, (num_groups, -1)) for part in (x, whole))
    opened = gate.double().sigmoid() * (gate.double() if activation == "silu" else 1.0)
    expected = plain_norm(*groups, 1e-5).flatten(1) * opened
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_close("y", y, expected, BOUNDS[dtype])
    assert torch.equal(wide, kept[0])
    assert torch.equal(projected, kept[1])


@every_kernel
def test_a_shut_gate_lets_nothing_through_and_one_group_is_the_default(backend, device, rng, assert_close):
    x, weight = torch.randn(2, 64, generator=rng).to(device), torch.rand(64, generator=rng).to(device)
    shut, open_ = torch.full_like(x, -1e4), torch.full_like(x, 1e4)
    gated = KERNELS[backend].gated_rms_norm
    assert torch.equal(gated(x, shut, weight, 1e-5), torch.zeros_like(x))
    assert_close("y", gated(x, open_, weight, 1e-5), plain_norm(x, weight, 1e-5), 1e-6)


@every_kernel
def test_groups_of_a_gated_norm_are_a_ranks_own(backend, device, rng, assert_close):
    """Half the groups over half the channels are half of the whole: no rank needs another's statistics."""
    x, gate = torch.randn(2, 5, 6 * 40, generator=rng).to(device)
    weight = torch.rand(6 * 40, generator=rng).to(device)
    gated = KERNELS[backend].gated_rms_norm
    halves = [gated(x[:, part], gate[:, part], weight[part], 1e-6, 3) for part in (slice(0, 120), slice(120, 240))]
    assert_close("y", torch.cat(halves, dim=1), gated(x, gate, weight, 1e-6, 6), 1e-7)


def angles(R):
    """[500, R]: cosines, then sines."""
    turned = torch.arange(500)[:, None] * 10000.0 ** (-torch.arange(0, R, 2) / R)
    return torch.cat([turned.cos(), turned.sin()], -1)


def rotate(x, cos, sin):
    """x [T, H, D] in place in its first channels; cos, sin: [T, 1, R/2]."""
    half = cos.shape[-1]
    first, second = x[..., :half].clone(), x[..., half : 2 * half].clone()
    x[..., :half] = first * cos - second * sin
    x[..., half : 2 * half] = second * cos + first * sin


@every_kernel
@every_dtype
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 2), (18, 18), (20, 1)])
@pytest.mark.parametrize(("D", "R"), [(16, 8), (64, 32), (128, 64), (96, 96), (80, 20)])
def test_rope_turns_the_first_channels_in_pairs_and_keeps_the_rest(
    backend, dtype, heads, kv_heads, D, R, device, rng, assert_close
):
    positions = torch.tensor([0, 7, 1, 499, 250, 0], device=device)
    slots = torch.tensor([13, 2, -1, 8, 5, -1], device=device)
    real = slots >= 0
    projected = torch.randn(len(slots), heads + 2 * kv_heads, D, generator=rng).to(device, dtype)
    cos_sin = angles(R).to(device)
    expected = projected.double()
    rotate(expected, *(x.double()[positions][:, None] for x in cos_sin.chunk(2, -1)))

    kept = projected.clone()
    caches = torch.full((2, 4, 4, kv_heads, D), float("nan"), dtype=dtype, device=device)
    parts = projected.split([heads, kv_heads, kv_heads], dim=1)
    load(backend).attention.rope_and_store_kv(*parts, positions, cos_sin, caches[0], caches[1], slots)

    q, stored = parts[0], caches.flatten(1, 2)
    assert_close("q", q, expected[:, :heads], BOUNDS[dtype])  # of padding rows too
    assert_close("keys", stored[0, slots[real]], expected[real, heads : heads + kv_heads], BOUNDS[dtype])
    assert torch.equal(stored[1, slots[real]], kept[real, heads + kv_heads :])
    for now, before in ((q, kept[:, :heads]), (stored[0, slots[real]], kept[real, heads : heads + kv_heads])):
        assert torch.equal(now[..., R:], before[..., R:])
        assert torch.equal(now[0], before[0])  # position 0 does not turn
    assert torch.equal(parts[2], kept[:, heads + kv_heads :])
    others = torch.ones(stored.shape[1], dtype=torch.bool, device=device).index_fill(0, slots[real], False)
    assert stored[:, others].isnan().all()


@every_kernel
@every_dtype
@pytest.mark.parametrize("norm_dtype", [None, "as x", torch.float32], ids=["rope alone", "norm", "float32 norm"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 2), (16, 16), (20, 1)])
@pytest.mark.parametrize(("D", "R"), [(16, 8), (128, 64), (96, 96), (80, 20)])
def test_heads_are_normed_then_rotated_in_place(
    backend, dtype, norm_dtype, heads, kv_heads, D, R, device, rng, assert_close
):
    """q and key as views of one projection, alone and on their way into the cache."""
    positions = torch.tensor([0, 7, 499, 250], device=device)
    projected = (torch.randn(4, heads + 2 * kv_heads, D, generator=rng) * 3).to(device, dtype)
    is_normed = norm_dtype is not None
    weight_dtype = torch.float32 if norm_dtype == torch.float32 else dtype
    q_weight, key_weight = (1.0 + torch.rand(2, D, generator=rng)).to(device, weight_dtype)
    cos_sin = angles(R).to(device)
    norm = HeadNorm(q_weight, key_weight, 1e-2) if is_normed else None
    weights = torch.cat([q_weight.expand(heads, D), key_weight.expand(kv_heads, D)])
    expected = projected[:, : heads + kv_heads].double()
    if is_normed:
        expected = plain_norm(expected, weights, 1e-2)
    rotate(expected, *(x.double()[positions][:, None] for x in cos_sin.chunk(2, -1)))

    alone, stored = projected.clone(), projected.clone()
    q, key, value = alone.split([heads, kv_heads, kv_heads], dim=1)
    load(backend).attention.rope_(q, key, positions, cos_sin, norm)
    assert_close("q and key", alone[:, : heads + kv_heads], expected, BOUNDS[dtype])
    assert torch.equal(value, projected[:, heads + kv_heads :])
    if not is_normed:
        assert torch.equal(alone[..., R:], projected[..., R:])

    q, key, value = stored.split([heads, kv_heads, kv_heads], dim=1)
    caches = torch.full((2, 2, 2, kv_heads, D), float("nan"), dtype=dtype, device=device)
    slots = torch.tensor([3, 0, 2, 1], device=device)
    load(backend).attention.rope_and_store_kv(q, key, value, positions, cos_sin, *caches, slots, norm)
    assert torch.equal(q, alone[:, :heads])
    assert torch.equal(caches[0].flatten(0, 1)[slots], alone[:, heads : heads + kv_heads])
    assert torch.equal(caches[1].flatten(0, 1)[slots], value)


@every_kernel
def test_rope_takes_queries_and_keys_interleaved_per_head_and_flat(backend, device, rng, assert_close):
    positions, cos_sin = torch.tensor([3, 0, 11], device=device), angles(8).to(device)
    norm = HeadNorm(*torch.rand(2, 16, generator=rng).to(device), 1e-6)
    flat = torch.randn(3, 3, 4, 16, generator=rng).to(device)
    interleaved = flat.transpose(1, 2).contiguous()
    load(backend).attention.rope_(flat[:, 0], flat[:, 1], positions, cos_sin, norm)
    load(backend).attention.rope_(interleaved[:, :, 0], interleaved[:, :, 1], positions, cos_sin, norm)
    assert torch.equal(interleaved.transpose(1, 2), flat)


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
@every_dtype
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 100), (2, 1500)], ids=str)
def test_silu_in_place_changes_its_columns_alone(backend, dtype, shape, device, rng, assert_close):
    wide = (torch.randn(shape[0], shape[1] + 5, generator=rng) * 4).to(device, dtype)
    kept = wide.clone()
    x = wide[:, : shape[1]]
    assert KERNELS[backend].silu_(x) is x
    before = kept[:, : shape[1]].double()
    if shape[0]:
        assert_close("x", x, before * torch.sigmoid(before), BOUNDS[dtype])
    assert torch.equal(wide[:, shape[1] :], kept[:, shape[1] :])


@every_kernel
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 3, 80), (3, 24, 128)], ids=str)
def test_gate_opens_heads_in_place_by_its_sigmoid(backend, dtype, shape, device, rng, assert_close):
    """The gate is a view of heads of queries and gates by turns."""
    heads = (torch.randn(*shape[:2], 2 * shape[2], generator=rng) * 3).to(device, dtype)
    x, gate = torch.randn(shape, generator=rng).to(device, dtype), heads[..., shape[2] :]
    before, kept = x.double(), heads.clone()
    assert KERNELS[backend].gate_(x, gate) is x
    assert_close("x", x, before * gate.double().sigmoid(), BOUNDS[dtype])
    assert torch.equal(heads, kept)


@every_kernel
@every_dtype
@pytest.mark.parametrize("is_mixed", [False, True], ids=["gated", "mixed"])
def test_join_weighs_the_shared_expert_by_the_token(backend, dtype, is_mixed, device, rng, assert_close):
    x, y, shared = (torch.randn(5, 80, generator=rng).to(device, dtype) for _ in range(3))
    coefficient = torch.randn(1, 80, generator=rng).to(device)
    c = torch.sigmoid(x.double() @ coefficient.double().t())
    expected = (1 - c) * y.double() + c * shared.double() if is_mixed else y.double() + c * shared.double()
    joined = KERNELS[backend].join(x, coefficient, y, shared, is_mixed=is_mixed)
    assert_close("joined", joined, expected, BOUNDS[dtype])


@every_kernel
def test_silu_of_a_very_negative_gate_is_zero(backend, device):
    x = torch.tensor([[-200.0, -1e4, 3.0, 3.0]], device=device)
    assert torch.equal(KERNELS[backend].silu_and_mul(x), torch.zeros(1, 2, device=device))


@pytest.mark.gpu
def test_no_kernel_synchronises_with_the_host(device):
    x = torch.randn(4, 128, device=device)
    weight = torch.ones(128, device=device)

    def everything() -> None:
        KERNELS["triton"].rms_norm(x, weight, 1e-5)
        KERNELS["triton"].add_rms_norm(x, x, weight, 1e-5, 1.0, 1.0)
        KERNELS["triton"].gated_rms_norm(x, x, weight, 1e-5, 2)
        KERNELS["triton"].silu_and_mul(x)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
