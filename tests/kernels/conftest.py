"""What the kernel tests share. They run on CUDA where there is a device, otherwise on the CPU, where Triton interprets
its kernels: sizes are small there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _poison(poisoned_empty: None) -> None:
    """No kernel may rely on what fresh memory holds."""


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def assert_close() -> Callable[[str, Tensor, Tensor, float], None]:
    """assert_close(name, actual, expected, bound): RMS of the error over RMS of `expected`."""

    def check(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
        actual, expected = actual.double().cpu(), expected.double().cpu()
        assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} of {actual.numel()} values not finite"
        size = expected.square().mean().sqrt().item()
        error = (actual - expected).square().mean().sqrt().item()
        assert error <= bound * size, f"{name}: error {error / max(size, 1e-300):.2e} of its RMS, bound {bound:.0e}"

    return check


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
