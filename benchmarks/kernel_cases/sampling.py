"""A token for each row of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from leyden.benchmarks.kernel_cases import base
from leyden.benchmarks.kernel_cases.base import Bound, Implementation, Work, generator, normal
from torch import Tensor


class SamplingInputs(NamedTuple):
    """In the order of `Sample`."""

    logits: Tensor  # [B, V]
    temperature: Tensor  # [B] float32, as are the rest but for top_k, which is int32
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


SAMPLERS = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (1.0, 0, 1.0, 0.0),
    "min_p 0.05": (1.0, 0, 1.0, 0.05),
    "top_k 50": (1.0, 50, 1.0, 0.0),
    "top_p 0.9": (1.0, 0, 0.9, 0.0),
}


@dataclass(frozen=True)
class SamplingCase:
    """A token for each of `rows` rows of logits, all drawn alike."""

    sampler: str  # of SAMPLERS
    rows: int = 256
    vocab: int = 200_064
    group: str = "sampling"
    num_steps: int = 1

    @property
    def label(self) -> str:
        return f"{self.sampler}, B={self.rows}, V={self.vocab:,}"

    @property
    def name(self) -> str:
        return f"sampling/{self.sampler.replace(' ', '')}"

    def inputs(self, seed: int, *, checked: bool) -> SamplingInputs:
        temperature, top_k, top_p, min_p = (
            torch.full((self.rows,), value, device=base.DEVICE) for value in SAMPLERS[self.sampler]
        )
        uniform = torch.rand(self.rows, generator=generator(seed + 1), device=base.DEVICE)
        logits = normal(seed, self.rows, self.vocab).mul_(3)
        return SamplingInputs(logits, temperature.float(), top_k.int(), top_p.float(), min_p.float(), uniform)

    def work(self, inputs: SamplingInputs | None = None) -> Work:
        """Every logit is read once."""
        return Work(2 * self.rows * self.vocab)

    def expected(self, inputs: SamplingInputs) -> dict[str, Tensor]:
        return {"out": torch.ones(self.rows, dtype=torch.float64, device=inputs.logits.device)}

    def implementations(self) -> dict[str, Implementation]:
        return {"leyden": Implementation(self.bind)}

    def bind(self, inputs: SamplingInputs) -> Bound:
        kernels = base.our_kernels()
        kept: list[Tensor] = []

        def step(_: int) -> None:
            kept[:] = [kernels.sample(*inputs)]

        return Bound(step, lambda: (1 + torch.stack([self._miss(inputs, kept[0], i) for i in range(self.rows)]),))

    def _miss(self, inputs: SamplingInputs, tokens: Tensor, row: int) -> Tensor:
        """By how much probability the uniform number lies outside of the token's share, in float64; greedy: whether
        another logit is larger."""
        x, token = inputs.logits[row].double(), tokens[row].long()
        temperature, top_k, top_p, min_p = SAMPLERS[self.sampler]
        if temperature == 0:
            return (x[token] < x.max()).double()
        p = torch.softmax(x / temperature, dim=0)
        ordered = p.sort(descending=True).values
        last = top_k - 1 if top_k else int((ordered.cumsum(0) < top_p).sum().clamp(max=len(p) - 1))
        kept = torch.where((p >= ordered[last]) & (p >= min_p * ordered[0]), p, 0.0)
        share = kept.cumsum(0) / kept.sum()
        before, after = share[token] - kept[token] / kept.sum(), share[token]
        return torch.relu(before - inputs.uniform[row]) + torch.relu(inputs.uniform[row] - after)
