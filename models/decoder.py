"""The one decoder of all families: a `ModelSpec` says what each layer is.

    x = norm(h);  h = alpha * (x or h) + beta * mixer(x)
    x = norm(h);  h = alpha * (x or h) + beta * mlp(x)

With `postnorm` the residual is the normed tensor x, otherwise h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.bundles import Weight
from .forward_batch import ForwardBatch
from .layers.build import Build
from .layers.experts import SparseMoe
from .layers.mlp import DenseMlp, SharedExpertMlp
from .layers.norm import RMSNorm
from .layers.rotary import RotaryTables
from .loading.target import Target
from .mixers.cache import CacheSpec, LayerCache
from .mixers.lightning import LightningAttention
from .mixers.lightning_backends import LinearAttentionBackend
from .mixers.mixer import Mixer
from .mixers.softmax import SoftmaxAttention
from .specs import LayerSpec, LightningSpec, MlpSpec, ModelSpec, Residual


class ResidualStream(NamedTuple):
    """h = alpha * residual + beta * update [T, d]. The sum is left to the norm that reads it."""

    residual: Tensor
    update: Tensor | None = None
    factors: Residual = Residual(1.0, 1.0)

    def normed(self, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """(norm(h), h)."""
        if self.update is None:
            return norm(self.residual), self.residual
        return norm.add(self.update, self.residual, self.factors.alpha, self.factors.beta)


class DecoderLayer(nn.Module):
    """A mixer and an MLP, each behind a norm and beside the residual stream."""

    def __init__(self, model: ModelSpec, spec: LayerSpec, mixer: Mixer, build: Build) -> None:
        super().__init__()
        self.spec = spec
        self.postnorm = model.postnorm
        self.mixer = mixer
        self.mlp = _build_mlp(model.hidden_size, spec.mlp, build)
        self.input_norm = RMSNorm(model.hidden_size, model.rms_norm_eps, build)
        self.mlp_norm = RMSNorm(model.hidden_size, model.rms_norm_eps, build)

    def forward(self, stream: ResidualStream, batch: ForwardBatch, cache: LayerCache) -> ResidualStream:
        x, h = stream.normed(self.input_norm)
        mixed = self.mixer(x, batch, cache)
        x, h = ResidualStream(x if self.postnorm else h, mixed, self.spec.mixer_residual).normed(self.mlp_norm)
        return ResidualStream(x if self.postnorm else h, self.mlp(x), self.spec.mlp_residual)

    def targets(self, layer: str) -> Iterator[Target]:
        yield from self.input_norm.targets(f"{layer}input_layernorm")
        yield from self.mixer.targets(f"{layer}self_attn.")
        yield from self.mlp_norm.targets(f"{layer}post_attention_layernorm")
        yield from self.mlp.targets(layer if isinstance(self.mlp, SharedExpertMlp) else f"{layer}mlp.")


class Decoder(nn.Module):
    """Token ids to hidden states to logits. Knows rows, slots and blocks from the batch, nothing of requests.

    `linear_backend` computes the lightning layers. On the device `meta` a decoder takes no memory, and `caches`,
    `targets` and `position_bytes` answer as anywhere.
    """

    def __init__(self, spec: ModelSpec, build: Build, linear_backend: LinearAttentionBackend) -> None:
        super().__init__()
        self.spec = spec
        self.kernels = build.kernels
        self.embedding = build.parameter(spec.vocab_size, spec.hidden_size)
        self.rotary = RotaryTables(build.device)
        self.layers = nn.ModuleList()
        for layer in spec.layers:
            mixer = self._build_mixer(layer, build, linear_backend)
            self.layers.append(DecoderLayer(spec, layer, mixer, build))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, build)
        is_tied = spec.tie_word_embeddings
        self.lm_head = self.embedding if is_tied else build.parameter(spec.vocab_size, spec.hidden_size)

    @property
    def caches(self) -> list[CacheSpec]:
        """What each layer keeps of a sequence, in the order of the layers."""
        return [layer.mixer.cache for layer in self._layers()]

    def forward(self, batch: ForwardBatch, caches: list[LayerCache]) -> Tensor:
        """Hidden states [T, d] after the last layer, before the last norm. `caches`: one per layer, updated in place
        for the batch's slots and at its `slot_mapping`."""
        stream = ResidualStream(F.embedding(batch.input_ids, self.embedding))
        for layer, cache in zip(self.layers, caches, strict=True):
            stream = layer(stream, batch, cache)
        return stream.normed(self.norm)[1]

    def fold_pending(self, caches: list[LayerCache], slots: Tensor, num_pending: Tensor) -> None:
        """Bring the tokens that wait in rings into the states of all layers, in place. slots: [N] int32, each once;
        num_pending: [N] int32, the tokens that wait in each."""
        for layer, cache in zip(self._layers(), caches, strict=True):
            layer.mixer.fold(cache, slots, num_pending)

    def compute_logits(self, h: Tensor) -> Tensor:
        """h [N, d], rows of the forward's result -> logits [N, vocab]."""
        return self.kernels.dense.linear(self.norm(h), Weight(self.lm_head))

    def reserve_positions(self, max_positions: int) -> None:
        """Make the tables by position long enough; must be called before a forward reaches those positions."""
        self.rotary.reserve(max_positions)

    def position_bytes(self, max_positions: int) -> int:
        """Bytes on the device that `reserve_positions` takes."""
        return self.rotary.nbytes(max_positions)

    def targets(self) -> Iterator[Target]:
        """Every checkpoint tensor that the model wants, and the view that it fills."""
        yield Target("embed_tokens.weight", self.embedding)
        for i, layer in enumerate(self._layers()):
            yield from layer.targets(f"layers.{i}.")
        yield from self.norm.targets("norm")
        if not self.spec.tie_word_embeddings:
            yield Target("lm_head.weight", self.lm_head)

    def ignored_names(self) -> set[str]:
        """Tensors that a checkpoint may hold and the model does not want; the loader refuses any other strange one."""
        return {"lm_head.weight"} if self.spec.tie_word_embeddings else set()

    def _layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def _build_mixer(self, layer: LayerSpec, build: Build, linear_backend: LinearAttentionBackend) -> Mixer:
        hidden_size = self.spec.hidden_size
        if isinstance(layer.mixer, LightningSpec):
            return LightningAttention(hidden_size, layer.mixer, build, linear_backend)
        return SoftmaxAttention(hidden_size, layer.mixer, build, self.rotary)


def _build_mlp(hidden_size: int, spec: MlpSpec, build: Build) -> SparseMoe | DenseMlp | SharedExpertMlp:
    mlp = SparseMoe(hidden_size, spec, build) if spec.router else DenseMlp(hidden_size, spec.width, build)
    if spec.shared_width == 0:
        return mlp
    return SharedExpertMlp(mlp, hidden_size, spec.shared_width, build)
