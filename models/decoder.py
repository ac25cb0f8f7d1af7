"""The one decoder of all families: a `ModelSpec` says what each layer is.

    x = norm(h);  h = alpha * (x or h) + beta * mixer(x)
    x = norm(h);  h = alpha * (x or h) + beta * mlp(x)

With `postnorm` the residual is the normed tensor x, otherwise h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.bundles import Weight
from .forward_batch import ForwardBatch
from .layers.build import Build
from .layers.experts import SparseMoe
from .layers.mlp import DenseMlp, SharedExpert
from .layers.norm import RMSNorm
from .layers.rotary import RotaryTables
from .loading.target import Target
from .mixers.backends import LinearBackends
from .mixers.cache import CacheSpec, LayerCache
from .mixers.gated_delta import GatedDeltaNet
from .mixers.lightning import LightningAttention
from .mixers.mixer import Mixer, MixerBuild
from .mixers.softmax import SoftmaxAttention
from .specs import DenseSpec, GatedDeltaSpec, LayerSpec, LightningSpec, ModelSpec, Residual, SoftmaxSpec

# The module of each spec of a mixer.
MIXERS: dict[type, Callable[[Any, MixerBuild], Mixer]] = {
    LightningSpec: LightningAttention,
    GatedDeltaSpec: GatedDeltaNet,
    SoftmaxSpec: SoftmaxAttention,
}


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
        self.mlp: DenseMlp | SparseMoe
        if isinstance(spec.mlp, DenseSpec):
            self.mlp = DenseMlp(model.hidden_size, spec.mlp.width, build.within("mlp.", "mlp"))
        else:
            self.mlp = SparseMoe(model.hidden_size, spec.mlp, build.within("mlp.", "experts"))
        self.shared = SharedExpert(model.hidden_size, spec.shared, build) if spec.shared is not None else None
        self.input_norm = RMSNorm(model.hidden_size, model.norm, build)
        self.mlp_norm = RMSNorm(model.hidden_size, model.norm, build)

    def forward(self, stream: ResidualStream, batch: ForwardBatch, cache: LayerCache) -> ResidualStream:
        x, h = stream.normed(self.input_norm)
        mixed = self.mixer(x, batch, cache)
        x, h = ResidualStream(x if self.postnorm else h, mixed, self.spec.mixer_residual).normed(self.mlp_norm)
        y = self.mlp(x)
        if self.shared is not None:
            y = self.shared(x, y)
        return ResidualStream(x if self.postnorm else h, y, self.spec.mlp_residual)

    def targets(self, layer: str) -> Iterator[Target]:
        yield from self.input_norm.targets(f"{layer}input_layernorm")
        yield from self.mixer.targets(f"{layer}self_attn.")
        yield from self.mlp_norm.targets(f"{layer}post_attention_layernorm")
        yield from self.mlp.targets(f"{layer}mlp.")
        if self.shared is not None:
            yield from self.shared.targets(layer)


class Decoder(nn.Module):
    """Token ids to hidden states to logits. Knows rows, slots and blocks from the batch, nothing of requests.

    On the device `meta` a decoder takes no memory, and `caches`, `targets` and `position_bytes` answer as anywhere.
    """

    def __init__(self, spec: ModelSpec, build: Build, linear_backends: LinearBackends) -> None:
        super().__init__()
        self.spec = spec
        self.dense = build.kernels.dense
        self.shard = build.shard
        self.embedding = build.parameter(spec.vocab_size, spec.hidden_size)
        self.rotary = RotaryTables(build.device)
        common = MixerBuild(spec.hidden_size, build, self.rotary, linear_backends)
        self.layers = nn.ModuleList(self._layer(layer, common, f"layers.{i}.") for i, layer in enumerate(spec.layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm, build)
        is_tied = spec.tie_word_embeddings
        self.lm_head = self.embedding if is_tied else build.parameter(spec.vocab_size, spec.hidden_size)
        self.head = Weight(self.lm_head)

    def _layer(self, layer: LayerSpec, common: MixerBuild, name: str) -> DecoderLayer:
        build = common.build.within(name)
        mixer = MIXERS[type(layer.mixer)](layer.mixer, common._replace(build=build.within("self_attn.", "mixers")))
        return DecoderLayer(self.spec, layer, mixer, build)

    @property
    def caches(self) -> list[CacheSpec]:
        """The `CacheSpec` of each layer, in the order of the layers."""
        return [layer.mixer.cache for layer in self._layers()]

    def forward(self, batch: ForwardBatch, caches: list[LayerCache]) -> Tensor:
        """Hidden states [T, d] after the last layer, before the last norm. `caches`: one per layer, updated in place
        for the batch's slots and at its `slot_mapping`."""
        stream = ResidualStream(F.embedding(batch.input_ids, self.embedding))
        for layer, cache in zip(self.layers, caches, strict=True):
            stream = layer(stream, batch, cache)
        return stream.normed(self.norm)[1]

    def fold_pending(self, caches: list[LayerCache], slots: Tensor, num_pending: Tensor, context_lens: Tensor) -> None:
        """Bring the tokens that wait in rings into the states of all layers, in place. slots: [N] int32, each once;
        num_pending: [N] int32, the tokens that wait in each; context_lens: [N] int32, the tokens of each slot's
        sequence, waiting ones included."""
        for layer, cache in zip(self._layers(), caches, strict=True):
            layer.mixer.fold(cache, slots, num_pending, context_lens)

    def compute_logits(self, h: Tensor) -> Tensor:
        """h [N, d], rows of the forward's result -> logits [N, vocab]."""
        return self.shard.gather(self.dense.linear(self.norm(h), self.head))

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
        """Canonical names of tensors that a checkpoint may hold and the model does not want."""
        return {"lm_head.weight"} if self.spec.tie_word_embeddings else set()

    def _layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer
