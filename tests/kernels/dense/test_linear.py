"""x W^T against a product in float64, for the one row that has a kernel and for the rows that have none."""

from __future__ import annotations

import pytest
import torch
from leyden.kernels import load
from leyden.kernels.bundles import Weight

KERNELS = {name: load(name).dense for name in ("torch", "triton")}
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
if not torch.cuda.is_available():
    BOUNDS[torch.bfloat16] = 6e-3  # Triton's interpreter truncates to bfloat16


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "size", "num_channels"),
    [(1, 1, 1), (1, 100, 7), (1, 512, 40), (1, 1030, 13), (3, 100, 7), (0, 16, 8)],
)
def test_it_is_the_product(backend, dtype, num_tokens, size, num_channels, device, rng, assert_close):
    x = torch.randn(num_tokens, size, generator=rng).to(device, dtype)
    wide = torch.randn(num_channels, size + 3, generator=rng).to(device, dtype)
    weight = wide[:, :size]
    wide[:, size:] = float("nan")  # a row's neighbour in memory is no part of it
    y = KERNELS[backend].linear(x, Weight(weight))
    assert y.dtype == dtype
    if num_tokens:
        assert_close("y", y, x.double() @ weight.double().T, BOUNDS[dtype])
    assert y.shape == (num_tokens, num_channels)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_sums_stay_in_float32_where_asked(backend, dtype, num_tokens, device, rng, assert_close):
    x, weight = (torch.randn(rows, 1030, generator=rng).to(device, dtype) for rows in (num_tokens, 13))
    y = KERNELS[backend].linear(x, Weight(weight), torch.float32)
    assert y.dtype == torch.float32
    assert_close("y", y, x.double() @ weight.double().T, 1e-6)
