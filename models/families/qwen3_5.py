"""Qwen3.5, 3.6 and 3.8, with one MLP or experts behind each layer: the parts of `qwen`.

Official checkpoints hold the text model inside a vision model (`...ForConditionalGeneration`): its fields in
text_config, its tensors under `model.language_model.`. It is served alone, for text. In a text the three positions of
its rope are equal, so that mrope_section and mrope_interleaved change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..specs import ModelSpec
from .fields import Fields
from .qwen import read_dense, read_experts, read_qwen

SERVED = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}


def read(config: Mapping[str, Any], architecture: str) -> ModelSpec:
    """The classes named `Qwen3_5` and `Qwen3_5Moe`. Raises `CheckpointError`."""
    fields = Fields(_with_text_fields(config))
    fields.must_all_be(SERVED)
    mlp = read_experts(fields) if "Moe" in architecture else read_dense(fields)
    return read_qwen(fields, [mlp] * fields.positive("num_hidden_layers"), architecture, is_grouped=False)


def _with_text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of text_config, and those beside it that it does not have."""
    text = Fields(config).section("text_config")
    return {**config, **text.present()}
