"""Softmax attention with grouped key/value heads, over keys and values in blocks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..forward_batch import ForwardBatch
from ..layers.norm import build_qk_norm
from ..layers.projection import Projection
from ..loading.target import Target
from ..specs import SoftmaxSpec
from .cache import CacheSpec, LayerCache, Part
from .mixer import Mixer, MixerBuild


class SoftmaxAttention(Mixer):
    """o_proj(softmax(scale * q k^T) v) with rope on the first channels of each head. The spec may ask for a norm of
    each head's q and k before, and for a gate of each head's output. Keeps the key and the value of each token."""

    def __init__(self, spec: SoftmaxSpec, common: MixerBuild) -> None:
        super().__init__()
        hidden_size, build = common.hidden_size, common.build
        self.spec = spec
        self.attention = build.kernels.attention
        self.dense = build.kernels.dense
        self.rotary = common.rotary.table(spec.rope)
        shape = (spec.num_kv_heads, spec.head_dim)
        self.cache = CacheSpec(token=(Part("key", shape, "activation"), Part("value", shape, "activation")))
        q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        assert not (spec.is_fused and spec.has_gate), "no checkpoint holds a gate in one tensor with k and v"
        separate = {"q_proj": 2 * q_width if spec.has_gate else q_width, "k_proj": kv_width, "v_proj": kv_width}
        fused = {"qkv_proj": q_width + 2 * kv_width}
        self.qkv_proj = Projection(hidden_size, fused if spec.is_fused else separate, build)
        self.qk_norm = build_qk_norm(spec.head_dim, spec.qk_norm, build)
        self.o_proj = Projection(q_width, {"o_proj": hidden_size}, build, split="in")

    def forward(self, x: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        q, gate, k, v = self._heads(self.qkv_proj(x))
        keys, values = cache.token
        norm = None if self.qk_norm is None else self.qk_norm.bundle
        self.attention.rope_and_store_kv(
            q, k, v, batch.positions, self.rotary.cos_sin, keys, values, batch.slot_mapping, norm
        )
        out = self._attend(q, keys, values, batch)
        if gate is not None:
            self.dense.gate_(out, gate)
        return self.o_proj(out.flatten(1))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Views of qkv: q [T, H, D], the gate [T, H, D] if there is one, k and v [T, H_kv, D]."""
        spec = self.spec
        num_queries = 2 * spec.num_heads if spec.has_gate else spec.num_heads
        heads = qkv.view(-1, num_queries + 2 * spec.num_kv_heads, spec.head_dim)
        q, k, v = heads.split([num_queries, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        return (q[:, 0::2], q[:, 1::2], k, v) if spec.has_gate else (q, None, k, v)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, batch: ForwardBatch) -> Tensor:
        """Rotated q [T, H, D] against keys, values [num_blocks, block_size, H_kv, D] that hold this step's tokens
        -> [T, H, D]."""
        out = q.new_empty(q.shape)
        table, scale = batch.block_table, self.spec.scale
        if part := batch.prefills:
            here = part.tokens
            self.attention.prefill(q[here], keys, values, table, part.rows, part.context_lens, scale, out[here])
        if part := batch.decodes:
            here = part.tokens
            self.attention.decode(q[here], keys, values, table, part.rows, part.context_lens, scale, out[here])
        return out

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.qkv_proj.targets(prefix)
        if self.qk_norm is not None:
            yield from self.qk_norm.targets(prefix)
        yield from self.o_proj.targets(prefix)
