"""MiniMax-Text-01 and M1: lightning attention in most layers, softmax attention in a few, experts after each.

    x = norm(h);  h = alpha * (x or h) + beta * attention(x)
    x = norm(h);  h = alpha * (x or h) + beta * mlp(x)

With `postnorm` the residual is the normed tensor x, otherwise h. "MiniMax-01: Scaling Foundation Models with Lightning
Attention" (2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Kernels
from .forward_batch import ForwardBatch
from .layers.experts import SharedExpertMlp, SparseMoe
from .layers.projection import DenseMlp, Projection, RMSNorm, RotaryTable, parameter
from .loading.weights import Target
from .mixers.lightning_backends import FullAttentionBackend, LightningCall, LinearAttentionBackend, LinearState
from .specs import LayerSpec, LightningSpec, ModelConfig, Residual, SoftmaxSpec

Cache = LinearState | tuple[Tensor, Tensor]  # one layer's states, or its keys and values


class LightningAttention(nn.Module):
    """out_proj(sigmoid(gate x) * norm(lightning(silu(q), silu(k), silu(v)))), no rope."""

    def __init__(
        self,
        hidden_size: int,
        spec: LightningSpec,
        kernels: Kernels,
        backend: LinearAttentionBackend,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.kernels = kernels
        width = spec.num_heads * spec.head_dim
        self.in_proj = Projection(
            hidden_size, {"qkv_proj": 3 * width, "output_gate": width}, kernels, device=device, dtype=dtype
        )
        self.norm = RMSNorm(width, spec.norm_eps, kernels, device=device, dtype=dtype)
        self.out_proj = Projection(width, {"out_proj": hidden_size}, kernels, device=device, dtype=dtype)
        self.slopes = torch.tensor(spec.slopes, dtype=torch.float32, device=device)

    def forward(self, x: Tensor, batch: ForwardBatch, state: LinearState) -> Tensor:
        """x [T, d] -> [T, d]; updates the batch's slots of `state` in place, and the snapshots that the batch wants."""
        heads, dim = self.spec.num_heads, self.spec.head_dim
        qkv, gate = self.in_proj(x).split([3 * heads * dim, heads * dim], dim=-1)
        # Interleaved per head: rows [q | k | v] of head 0, then of head 1, ...
        q, k, v = self.kernels.silu_(qkv).view(-1, heads, 3 * dim).split(dim, dim=-1)
        if batch.snapshots.shape[0]:
            rows = (batch.state_indices, batch.has_initial_state, batch.query_start_loc)
            self.kernels.lightning_snapshot(k, v, self.slopes, state.state, *rows, batch.snapshots, state.snapshots)
        out = x.new_empty(x.shape[0], heads, dim)
        self.backend.forward(LightningCall(q, k, v, self.slopes, self.spec.scale, state, batch, out))
        return self.out_proj(self.norm.gated(out.flatten(1), gate))

    def fold(self, state: LinearState, slots: Tensor, num_pending: Tensor) -> None:
        """Bring the tokens that wait in these slots' rings into their states. slots, num_pending: [N] int32."""
        self.kernels.lightning_fold(self.slopes, *state.pools, slots, num_pending > 0, num_pending)

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.in_proj.targets(prefix)
        yield from self.norm.targets(f"{prefix}norm")
        yield from self.out_proj.targets(prefix)


class SoftmaxAttention(nn.Module):
    """Grouped-query attention with rope on the first channels of each head."""

    def __init__(
        self,
        hidden_size: int,
        spec: SoftmaxSpec,
        kernels: Kernels,
        rotary: RotaryTable,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.rotary = rotary
        self.backend = FullAttentionBackend(kernels)
        q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv_proj = Projection(
            hidden_size,
            {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width},
            kernels,
            device=device,
            dtype=dtype,
        )
        self.o_proj = Projection(q_width, {"o_proj": hidden_size}, kernels, device=device, dtype=dtype)

    def forward(self, x: Tensor, batch: ForwardBatch, cache: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, d] -> [T, d]; writes this step's keys and values into the cache."""
        spec = self.spec
        q, k, v = (
            self.qkv_proj(x)
            .view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
            .split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        )
        out = x.new_empty(x.shape[0], spec.num_heads, spec.head_dim)
        self.backend.forward(q, k, v, cache, self.rotary.cos_sin, spec.scale, batch, out)
        return self.o_proj(out.flatten(1))

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from self.qkv_proj.targets(prefix)
        yield from self.o_proj.targets(prefix)


class Stream(NamedTuple):
    """The residual stream, h = alpha * residual + beta * update [T, d]. The sum is left to the norm that reads it."""

    residual: Tensor
    update: Tensor | None = None
    factors: Residual = Residual(1.0, 1.0)

    def normed(self, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(norm(h), h)."""
        if self.update is None:
            return norm(self.residual), self.residual
        return norm.add(self.update, self.residual, self.factors.alpha, self.factors.beta)


class DecoderLayer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        spec: LayerSpec,
        mixer: LightningAttention | SoftmaxAttention,
        kernels: Kernels,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.postnorm = config.postnorm
        self.mixer = mixer
        self.mlp = _build_mlp(config.hidden_size, spec, kernels, device=device, dtype=dtype)
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, device=device, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, device=device, dtype=dtype)

    def forward(self, stream: Stream, batch: ForwardBatch, cache: Cache) -> Stream:
        x, h = stream.normed(self.input_norm)
        mixed = self.mixer(x, batch, cache)
        x, h = Stream(x if self.postnorm else h, mixed, self.spec.mixer_residual).normed(self.mlp_norm)
        return Stream(x if self.postnorm else h, self.mlp(x), self.spec.mlp_residual)

    def targets(self, layer: str) -> Iterator[Target]:
        yield from self.input_norm.targets(f"{layer}input_layernorm")
        yield from self.mixer.targets(f"{layer}self_attn.")
        yield from self.mlp_norm.targets(f"{layer}post_attention_layernorm")
        yield from self.mlp.targets(layer if isinstance(self.mlp, SharedExpertMlp) else f"{layer}mlp.")


class MiniMaxForCausalLM(nn.Module):
    """Token ids to hidden states to logits. Knows rows, slots and blocks from the batch, nothing of requests."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        linear_backend: LinearAttentionBackend,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.embedding = parameter(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.rotary: RotaryTable | None = None
        self.layers = nn.ModuleList()
        for spec in config.layers:
            mixer = self._build_mixer(spec.mixer, kernels, linear_backend, device=device, dtype=dtype)
            self.layers.append(DecoderLayer(config, spec, mixer, kernels, device=device, dtype=dtype))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, device=device, dtype=dtype)
        self.lm_head = (
            self.embedding
            if config.tie_word_embeddings
            else parameter(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        )

    def forward(self, batch: ForwardBatch, caches: list[Cache]) -> Tensor:
        """Hidden states [T, d] after the last layer. `caches` holds one entry per layer, updated in place."""
        stream = Stream(F.embedding(batch.input_ids, self.embedding))
        for layer, cache in zip(self.layers, caches, strict=True):
            stream = layer(stream, batch, cache)
        return stream.normed(self.norm)[1]

    def fold_pending(self, caches: list[Cache], slots: Tensor, num_pending: Tensor) -> None:
        """Bring what waits in rings into the states of all layers. slots: [N] int32, each once; num_pending: [N] int32,
        how many tokens of each wait."""
        for layer, cache in zip(self.layers, caches, strict=True):
            mixer = layer.mixer
            if isinstance(mixer, LightningAttention) and isinstance(cache, LinearState):
                mixer.fold(cache, slots, num_pending)

    def compute_logits(self, h: Tensor) -> Tensor:
        """h [N, d], rows of what `forward` returned -> logits [N, vocab]."""
        return self.kernels.linear(self.norm(h), self.lm_head)

    def reserve_positions(self, max_positions: int) -> None:
        """Make the rope table long enough; must be called before a forward reaches those positions."""
        if self.rotary is not None:
            self.rotary.reserve(max_positions)

    def position_bytes(self, max_positions: int) -> int:
        """Bytes on the device that `reserve_positions` takes."""
        return 0 if self.rotary is None else self.rotary.nbytes(max_positions)

    def targets(self) -> Iterator[Target]:
        """Every checkpoint tensor the model wants."""
        yield Target("embed_tokens.weight", self.embedding)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.targets(f"layers.{i}.")
        yield from self.norm.targets("norm")
        if not self.config.tie_word_embeddings:
            yield Target("lm_head.weight", self.lm_head)

    def ignored_names(self) -> set[str]:
        """Tensors that a checkpoint may hold and that are not wanted."""
        return {"lm_head.weight"} if self.config.tie_word_embeddings else set()

    def _build_mixer(
        self,
        spec: LightningSpec | SoftmaxSpec,
        kernels: Kernels,
        linear_backend: LinearAttentionBackend,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> LightningAttention | SoftmaxAttention:
        hidden_size = self.config.hidden_size
        if isinstance(spec, LightningSpec):
            return LightningAttention(hidden_size, spec, kernels, linear_backend, device=device, dtype=dtype)
        if self.rotary is None:  # all softmax layers of this family rotate alike
            self.rotary = RotaryTable(spec.rotary_dim, spec.rope_theta, device)
        return SoftmaxAttention(hidden_size, spec, kernels, self.rotary, device=device, dtype=dtype)


def _build_mlp(
    hidden_size: int, spec: LayerSpec, kernels: Kernels, *, device: torch.device, dtype: torch.dtype
) -> SparseMoe | DenseMlp | SharedExpertMlp:
    mlp: SparseMoe | DenseMlp
    if spec.mlp.router:
        mlp = SparseMoe(hidden_size, spec.mlp, kernels, device=device, dtype=dtype)
    else:
        mlp = DenseMlp(hidden_size, spec.mlp.width, kernels, device=device, dtype=dtype)
    if spec.mlp.shared_width == 0:
        return mlp
    return SharedExpertMlp(mlp, hidden_size, spec.mlp.shared_width, kernels, device=device, dtype=dtype)
