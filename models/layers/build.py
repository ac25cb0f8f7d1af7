"""The device, dtype, kernels and shard that every part of a model is built with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ...kernels import Kernels
from .shard import Shard


@dataclass(frozen=True, slots=True)
class Build:
    """Where a model lives and which kernels compute it. On the device `meta` a model takes no memory."""

    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    shard: Shard = field(default_factory=Shard)

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """An uninitialised parameter without gradient; `dtype` defaults to the model's. `loading.weights` fills it or
        fails."""
        data = torch.empty(*shape, device=self.device, dtype=dtype or self.dtype)
        return nn.Parameter(data, requires_grad=False)
