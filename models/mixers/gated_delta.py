"""A gated delta net as a layer: convolution, delta rule with a decay, gated norm (`kernels/delta/contract.py`).

"Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang et al. 2024), in the form of Qwen3-Next and Qwen3.5.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels.delta.contract import CHUNK, TAPS, DeltaInputs, DeltaState, DeltaWeights
from ..forward_batch import ForwardBatch
from ..layers.norm import RMSNorm
from ..layers.projection import Projection
from ..loading.target import Target
from ..specs import GatedDeltaSpec, NormSpec
from .backend import LinearBackend
from .cache import CacheSpec, LayerCache, Part
from .delta_backends import DeltaCall, ring_of
from .mixer import Mixer, MixerBuild


class GatedDeltaNet(Mixer):
    """out_proj(norm(delta(q, k, v)) * activation(z)), with q, k and v of a convolution over the last tokens, and the
    norm of each value head's output.

    Keeps a state and the last raw inputs of the convolution per sequence and, where the backend has a ring, the
    additions of the last tokens to both.
    """

    def __init__(self, spec: GatedDeltaSpec, common: MixerBuild) -> None:
        super().__init__()
        hidden_size, build = common.hidden_size, common.build
        self.spec = spec
        self.backend: LinearBackend[DeltaCall] = common.linear_backends.by_kind[spec.kind]
        self.delta = build.kernels.delta
        self.cache = _cache(spec, self.backend.ring_size)
        heads, channels, width = spec.num_value_heads, _channels(spec), spec.num_value_heads * spec.value_dim
        pieces = {"in_proj_qkv": channels, "in_proj_z": width, "in_proj_b": heads, "in_proj_a": heads}
        self.in_proj = Projection(hidden_size, pieces, build)
        self.conv = build.parameter(TAPS, channels, dtype=torch.float32)
        self.decay = build.parameter(heads, dtype=torch.float32)
        self.step_bias = build.parameter(heads, dtype=torch.float32)
        self.weights = DeltaWeights(self.conv, self.decay, self.step_bias)
        self.norm = RMSNorm(spec.value_dim, NormSpec(spec.norm_eps), build)
        self.out_proj = Projection(width, {"out_proj": hidden_size}, build, split="in")

    def forward(self, x: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        spec = self.spec
        raw, z, strength, step = self.in_proj(x).split(list(self.in_proj.pieces.values()), dim=-1)
        out = x.new_empty(x.shape[0], spec.num_value_heads, spec.value_dim)
        inputs = DeltaInputs(raw, step, strength)
        self.backend.forward(DeltaCall(inputs, self.weights, cache, batch, out))
        return self.out_proj(self.norm.gated(out.flatten(1), z, spec.num_value_heads, spec.gate_activation))

    def fold(self, cache: LayerCache, slots: Tensor, num_pending: Tensor, context_lens: Tensor) -> None:
        if cache.ring:
            self.delta.fold(DeltaState(*cache.slot), ring_of(cache, num_pending), slots, context_lens)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self._grouped(prefix) if self.spec.is_grouped else self.in_proj.targets(prefix)
        yield Target(f"{prefix}conv1d.weight", self.conv.t()[:, None])  # [C, 1, TAPS]
        yield Target(f"{prefix}A_log", self.decay)
        yield Target(f"{prefix}dt_bias", self.step_bias)
        yield from self.norm.targets(f"{prefix}norm")
        yield from self.out_proj.targets(prefix)

    def _grouped(self, prefix: str) -> Iterator[Target]:
        """The rows of each key head in turn: its q and k, the v and z of its value heads; its b and a."""
        spec = self.spec
        keys, values = spec.num_key_heads * spec.key_dim, spec.num_value_heads * spec.value_dim
        sizes = {"q": keys, "k": keys, "v": values, "z": values, "b": spec.num_value_heads, "a": spec.num_value_heads}
        parts = self.in_proj.weight.split(list(sizes.values()))
        of_head = dict(zip(sizes, (part.chunk(spec.num_key_heads) for part in parts), strict=True))
        for names in ("qkvz", "ba"):
            first, *rest = (of_head[name][head] for head in range(spec.num_key_heads) for name in names)
            yield Target(f"{prefix}in_proj_{names}.weight", first, behind=tuple(rest))


def _channels(spec: GatedDeltaSpec) -> int:
    """C: queries of all key heads, keys of all, values of all value heads."""
    return 2 * spec.num_key_heads * spec.key_dim + spec.num_value_heads * spec.value_dim


def _cache(spec: GatedDeltaSpec, ring_size: int) -> CacheSpec:
    heads, channels = spec.num_value_heads, _channels(spec)
    state = Part("state", (heads, spec.value_dim, spec.key_dim), "state")
    ring = (
        Part("key", (spec.num_key_heads, spec.key_dim), "activation"),
        Part("correction", (heads, spec.value_dim), "state"),
        Part("decay", (heads,), "float32"),
        Part("raw", (1, channels), "activation"),
    )
    return CacheSpec(
        slot=(state, Part("tail", (TAPS, channels), "activation")),
        ring=ring if ring_size else (),
        ring_size=ring_size,
        snapshot_every=CHUNK,
    )
