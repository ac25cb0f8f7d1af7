"""A gated delta net as a layer: convolution, delta rule with a decay, gated norm (`kernels/delta/contract.py`).

"Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang et al. 2024), in the form of Qwen3-Next and Qwen3.5.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...kernels.delta.contract import CHUNK, TAPS, DeltaInputs, DeltaState, DeltaWeights
from ..forward_batch import ForwardBatch
from ..layers.build import Build
from ..layers.norm import RMSNorm
from ..layers.projection import Projection, stored_names
from ..loading.target import Target, place
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
        self.in_proj, self.gates = _projections(spec, hidden_size, build)
        self.conv = build.parameter(TAPS, channels, dtype=torch.float32)
        self.decay = build.parameter(heads, dtype=torch.float32)
        self.step_bias = build.parameter(heads, dtype=torch.float32)
        self.weights = DeltaWeights(self.conv, self.decay, self.step_bias)
        self.norm = RMSNorm(spec.value_dim, NormSpec(spec.norm_eps), build)
        self.out_proj = Projection(width, {"out_proj": hidden_size}, build, split="in")

    def forward(self, x: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        spec = self.spec
        products = self.in_proj.split(x) if self.gates is None else (*self.in_proj.split(x), *self.gates.split(x))
        raw, z, strength, step = products
        out = x.new_empty(x.shape[0], spec.num_value_heads, spec.value_dim)
        inputs = DeltaInputs(raw, step, strength)
        self.backend.forward(DeltaCall(inputs, self.weights, cache, batch, out))
        return self.out_proj(self.norm.gated(out.flatten(1), z, spec.num_value_heads, spec.gate_activation))

    def fold(self, cache: LayerCache, slots: Tensor, num_pending: Tensor, context_lens: Tensor) -> None:
        if cache.ring:
            self.delta.fold(DeltaState(*cache.slot), ring_of(cache, num_pending), slots, context_lens)

    def targets(self, prefix: str) -> Iterator[Target]:
        if self.spec.is_grouped:
            yield from self._grouped(prefix)
        else:
            for projection in filter(None, (self.in_proj, self.gates)):
                yield from projection.targets(prefix)
        yield Target(f"{prefix}conv1d.weight", self.conv.t()[:, None])  # [C, 1, TAPS]
        yield Target(f"{prefix}A_log", self.decay)
        yield Target(f"{prefix}dt_bias", self.step_bias)
        yield from self.norm.targets(f"{prefix}norm")
        yield from self.out_proj.targets(prefix)

    def _grouped(self, prefix: str) -> Iterator[Target]:
        """The rows of each key head in turn: its q and k, the v and z of its value heads; its b and a."""
        num_heads, runs = self.spec.num_key_heads, _runs(self.spec)
        start = 0
        for names, projection in (("qkvz", self.in_proj), ("ba", self.gates or self.in_proj)):
            starts = {}
            start = 0 if projection is self.gates else start
            for name in names:
                starts[name] = start
                start += num_heads * runs[name]
            first, *rest = (
                place(projection.matrix.rows(starts[name] + head * runs[name], runs[name]))
                for head in range(num_heads)
                for name in names
            )
            yield Target(f"{prefix}in_proj_{names}.weight", first, behind=tuple(rest))


def _channels(spec: GatedDeltaSpec) -> int:
    """C: queries of all key heads, keys of all, values of all value heads."""
    return 2 * spec.num_key_heads * spec.key_dim + spec.num_value_heads * spec.value_dim


def _runs(spec: GatedDeltaSpec) -> dict[str, int]:
    """Rows of one key head, or of its value heads, in each part of the projections."""
    num_values = spec.num_value_heads // spec.num_key_heads
    values = num_values * spec.value_dim
    return {"q": spec.key_dim, "k": spec.key_dim, "v": values, "z": values, "b": num_values, "a": num_values}


def _projections(spec: GatedDeltaSpec, hidden_size: int, build: Build) -> tuple[Projection, Projection | None]:
    """q, k, v and z, and the gates b and a, which stay plain. Beside plain projections the gates are rows of the same
    product, and the second projection is None."""
    heads = spec.num_value_heads
    main = {"in_proj_qkv": _channels(spec), "in_proj_z": heads * spec.value_dim}
    gates = {"in_proj_b": heads, "in_proj_a": heads}
    runs = _runs(spec)
    if spec.is_grouped:
        names, pieces = ["in_proj_qkvz"], [runs[name] for name in "qkvz"] * spec.num_key_heads
    else:
        names, pieces = list(main), list(main.values())
    format = build.format(stored_names(names), pieces, hidden_size)
    if format.kind == "plain":
        return Projection(hidden_size, main | gates, build, format=format), None
    return (
        Projection(hidden_size, main, build, format=format),
        Projection(hidden_size, gates, build, dtype=build.dtype),
    )


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
