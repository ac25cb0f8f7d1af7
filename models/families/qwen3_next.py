"""Qwen3-Next and Qwen3-Coder-Next: the parts of `qwen`, with experts behind all layers or every few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..specs import ModelSpec
from .fields import Fields
from .qwen import read_dense, read_experts, read_qwen


def read(config: Mapping[str, Any], architecture: str) -> ModelSpec:
    """`Qwen3NextForCausalLM`. Raises `CheckpointError`."""
    fields = Fields(config)
    num_layers = fields.positive("num_hidden_layers")
    step, dense = fields.positive("decoder_sparse_step", 1), _dense_layers(config, num_layers)
    has_experts = fields.integer("num_experts") > 0
    mlps = [
        read_experts(fields) if has_experts and i not in dense and (i + 1) % step == 0 else read_dense(fields)
        for i in range(num_layers)
    ]
    return read_qwen(fields, mlps, architecture, is_grouped=True)


def _dense_layers(config: Mapping[str, Any], num_layers: int) -> list[int]:
    """mlp_only_layers, counted from 0."""
    layers = config.get("mlp_only_layers") or []
    if not isinstance(layers, list) or not all(type(i) is int and 0 <= i < num_layers for i in layers):
        raise CheckpointError(f"config.json: mlp_only_layers must list layers below {num_layers}, got {layers!r}")
    return layers
