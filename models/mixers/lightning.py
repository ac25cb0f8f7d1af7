"""Lightning attention as a layer: S_t = e^{-s} S_{t-1} + k_t v_t^T, o_t = scale * q_t S_t, s > 0 fixed per head.

"Lightning Attention-2" (Qin et al. 2024); "MiniMax-01: Scaling Foundation Models with Lightning Attention" (2025).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..forward_batch import ForwardBatch
from ..layers.norm import RMSNorm, build_qk_norm
from ..layers.projection import Projection
from ..loading.target import Target
from ..specs import LightningSpec, NormSpec
from .backend import LinearBackend
from .cache import CacheSpec, LayerCache, Part
from .lightning_backends import LightningCall, ring_of
from .mixer import Mixer, MixerBuild


class LightningAttention(Mixer):
    """out_proj(sigmoid(gate x) * norm(lightning(q, k, v))). The spec may ask for silu of q, k and v, and for a norm and
    a rotation of each head's q and k.

    Keeps a state per sequence and, where the backend has a ring, the keys and values of the last tokens.
    """

    def __init__(self, spec: LightningSpec, common: MixerBuild) -> None:
        super().__init__()
        hidden_size, build = common.hidden_size, common.build
        self.spec = spec
        self.backend: LinearBackend[LightningCall] = common.linear_backends.by_kind[spec.kind]
        self.kernels = build.kernels
        self.cache = _cache(spec, self.backend.ring_size)
        width = spec.num_heads * spec.head_dim
        self.in_proj = Projection(hidden_size, {"qkv_proj": 3 * width, "output_gate": width}, build)
        assert spec.rope is not None or spec.qk_norm is None, "a norm of heads is computed with their rotation"
        self.rotary = None if spec.rope is None else common.rotary.table(spec.rope)
        self.qk_norm = build_qk_norm(spec.head_dim, spec.qk_norm, build)
        self.norm = RMSNorm(width, NormSpec(spec.norm_eps), build)
        self.out_proj = Projection(width, {"out_proj": hidden_size}, build, split="in")
        self.slopes = torch.tensor(spec.slopes, dtype=torch.float32, device=build.device)

    def forward(self, x: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        heads, dim = self.spec.num_heads, self.spec.head_dim
        qkv, gate = self.in_proj(x).split([3 * heads * dim, heads * dim], dim=-1)
        q, k, v = self._heads(qkv, batch.positions)
        if batch.snapshots.shape[0]:
            (state,), (snapshots,) = cache.slot, cache.snapshots
            self.kernels.lightning.snapshot(k, v, self.slopes, state, batch.rows, batch.snapshots, snapshots)
        out = x.new_empty(x.shape[0], heads, dim)
        self.backend.forward(LightningCall(q, k, v, self.slopes, self.spec.scale, cache, batch, out))
        return self.out_proj(self.norm.gated(out.flatten(1), gate, self.spec.norm_groups))

    def _heads(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [T, 3 * H * D], overwritten, as q, k, v [T, H, D], which are views of it. positions: [T] int64."""
        heads, dim = self.spec.num_heads, self.spec.head_dim
        if self.spec.has_silu:
            self.kernels.dense.silu_(qkv)
        if self.spec.is_interleaved:
            q, k, v = qkv.view(-1, heads, 3 * dim).split(dim, dim=-1)
        else:
            q, k, v = qkv.view(-1, 3, heads, dim).unbind(1)
        if self.rotary is not None:
            norm = None if self.qk_norm is None else self.qk_norm.bundle
            self.kernels.attention.rope_(q, k, positions, self.rotary.cos_sin, norm)
        return q, k, v

    def fold(self, cache: LayerCache, slots: Tensor, num_pending: Tensor, context_lens: Tensor) -> None:
        if cache.ring:
            self.kernels.lightning.fold(self.slopes, cache.slot[0], ring_of(cache, num_pending), slots)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.in_proj.targets(prefix)
        if self.qk_norm is not None:
            yield from self.qk_norm.targets(prefix)
        yield from self.norm.targets(f"{prefix}norm")
        yield from self.out_proj.targets(prefix)


def _cache(spec: LightningSpec, ring_size: int) -> CacheSpec:
    heads, K, V = spec.state_shape
    state = Part("state", spec.state_shape, "state")
    ring = (Part("key", (heads, K), "activation"), Part("value", (heads, V), "activation"))
    return CacheSpec(slot=(state,), ring=ring if ring_size else (), ring_size=ring_size)
