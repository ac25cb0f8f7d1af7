"""Models whose layers keep different things: other heads and dims, beside a state what the last tokens left, and other
rings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import engines
import torch
from backends import BACKENDS, OF_DELTA
from leyden.engine.core import EngineCore
from leyden.engine.startup import model as startup_model
from leyden.engine.text import tokenizer
from leyden.models import decoder
from leyden.models.forward_batch import ForwardBatch
from leyden.models.loading.noise import fill_with_noise
from leyden.models.mixers.cache import LayerCache, Part
from leyden.models.mixers.lightning import LightningAttention
from leyden.models.mixers.mixer import MixerBuild
from leyden.models.specs import (
    DenseSpec,
    GatedDeltaSpec,
    LayerSpec,
    LightningSpec,
    ModelSpec,
    NormSpec,
    Residual,
    RopeSpec,
    SoftmaxSpec,
)
from tiny_models import VOCAB, save_minimax
from torch import Tensor

HIDDEN = 38  # its bytes are no multiple of 16


@dataclass(frozen=True, slots=True)
class ShiftedSpec:
    """A `ShiftedLightning` of these heads."""

    kind: ClassVar[str] = "shifted lightning"

    lightning: LightningSpec


class ShiftedLightning(LightningAttention):
    """Lightning attention over x_t + x_{t-1} / 2. Keeps the last x of a sequence, an activation, beside its state."""

    def __init__(self, spec: ShiftedSpec, common: MixerBuild) -> None:
        super().__init__(spec.lightning, common)
        last = Part("last", (common.hidden_size,), "activation")
        self.cache = self.cache._replace(slot=(last, *self.cache.slot))

    def forward(self, x: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        last, kept = cache.slot[0], cache.snapshots[0]
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        starts = batch.rows.starts.tolist()
        for row, slot in enumerate(batch.rows.slots.tolist()):
            before[starts[row]] = last[slot] if batch.rows.continues[row] else 0
            last[slot] = x[starts[row + 1] - 1]
        for row, num_tokens, snapshot in batch.snapshots.tolist():
            if snapshot >= 0:
                kept[snapshot] = x[starts[row] + num_tokens - 1]
        return super().forward(x + before / 2, batch, _without_last(cache))

    def fold(self, cache: LayerCache, slots: Tensor, num_pending: Tensor, context_lens: Tensor) -> None:
        super().fold(_without_last(cache), slots, num_pending, context_lens)


def _without_last(cache: LayerCache) -> LayerCache:
    """The parts of plain lightning attention."""
    return cache._replace(slot=cache.slot[1:], snapshots=cache.snapshots[1:])


def lightning(num_heads: int, head_dim: int) -> LightningSpec:
    slopes = tuple(0.5 / (head + 1) for head in range(num_heads))
    return LightningSpec(num_heads, head_dim, slopes, scale=head_dim**-0.5, norm_eps=1e-5)


MIXERS = (
    lightning(4, 16),
    SoftmaxSpec(num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeSpec(8, 1e4)),
    ShiftedSpec(lightning(2, 8)),
    lightning(2, 32),
    SoftmaxSpec(num_heads=2, num_kv_heads=1, head_dim=32, rope=RopeSpec(32, 1e4)),
    lightning(4, 16),
)
DELTA = (
    GatedDeltaSpec(2, 6, key_dim=8, value_dim=16, norm_eps=1e-5),
    SoftmaxSpec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=RopeSpec(8, 1e4),
        qk_norm=NormSpec(1e-5, is_zero_centred=True),
        has_gate=True,
    ),
    GatedDeltaSpec(3, 3, key_dim=16, value_dim=8, norm_eps=1e-5, gate_activation="sigmoid"),
    GatedDeltaSpec(2, 6, key_dim=8, value_dim=16, norm_eps=1e-5, is_grouped=True),
)
WITHOUT_SHIFT = tuple(mixer for mixer in MIXERS if not isinstance(mixer, ShiftedSpec))
# A model's mixers, and the backends that compute all of them.
MODELS = {
    "lightning": (MIXERS, BACKENDS),
    "gated delta": (DELTA, OF_DELTA),
    "lightning and gated delta": ((*WITHOUT_SHIFT, *DELTA), ["replay"]),
}


def mixed_spec(mixers: tuple[Any, ...] = MIXERS) -> ModelSpec:
    alike = Residual(1.0, 1.0)
    return ModelSpec(
        architecture="MiniMaxForCausalLM",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        layers=tuple(LayerSpec(mixer, DenseSpec(48), alike, alike) for mixer in mixers),
        norm=NormSpec(1e-5),
        postnorm=False,
        tie_word_embeddings=False,
        max_model_len=1024,
        eos_token_ids=(),
        dtype="float32",
    )


def install(monkeypatch, folder: Path, mixers: tuple[Any, ...] = MIXERS) -> Callable[..., EngineCore]:
    """Make engines of a model with these mixers, whose weights are the same each time."""
    save_minimax(folder)  # for its tokenizer; the spec and the weights are replaced
    spec = mixed_spec(mixers)
    monkeypatch.setitem(decoder.MIXERS, ShiftedSpec, ShiftedLightning)
    for module in (startup_model, tokenizer):
        monkeypatch.setattr(module, "read_config", lambda folder: spec)
    monkeypatch.setattr(startup_model, "fill_with_noise", _fill)
    return functools.partial(engines.make_core, folder, load_format="dummy")


def _fill(parameters: Iterator[Tensor]) -> None:
    """Noise, and decays of delta layers at which a token is remembered for a hundred others."""
    found = list(parameters)
    fill_with_noise(found, std=0.25)
    for parameter in found:
        if parameter.shape in [(mixer.num_value_heads,) for mixer in DELTA if isinstance(mixer, GatedDeltaSpec)]:
            parameter.fill_(-2.0)
