"""Tables of angles: those of transformers, plain and stretched, and exact where positions are far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from leyden.models.families.registry import from_hf
from leyden.models.layers.rotary import RotaryTable, frequencies
from leyden.models.specs import RopeSpec, YarnSpec
from qwen_models import DENSE, TINY
from transformers import Qwen3_5TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CPU = torch.device("cpu")
OFFICIAL = {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
STRETCHED: dict[str, dict[str, Any]] = {
    "as for a million tokens": OFFICIAL | {"factor": 4.0, "original_max_position_embeddings": 262144},
    "factor by the lengths": OFFICIAL | {"factor": None, "original_max_position_embeddings": 32768},
    "original length by the model's": OFFICIAL | {"factor": 2.0},
    "other ramp": OFFICIAL
    | {"factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
    "ramp not rounded": OFFICIAL | {"factor": 4.0, "original_max_position_embeddings": 8192, "truncate": False},
    "attention factor given": OFFICIAL | {"factor": 4.0, "attention_factor": 1.25},
    "ramp of no width": {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 6},
    "shorter": OFFICIAL | {"factor": 0.5, "original_max_position_embeddings": 1000},
}


def rope_of(rope: dict[str, Any], name: str = "rope_parameters", **more: Any) -> RopeSpec:
    config = TINY | {"architectures": [DENSE], "head_dim": 256, "max_position_embeddings": 262144}
    spec = from_hf(config | {name: {"rope_type": "yarn"} | rope} | more)
    return spec.layers[3].mixer.rope


@pytest.mark.parametrize("rope", STRETCHED.values(), ids=STRETCHED.keys())
def test_stretched_frequencies_are_those_of_transformers(rope):
    config = Qwen3_5TextConfig(
        **TINY | {"head_dim": 256, "max_position_embeddings": 262144, "rope_parameters": {"rope_type": "yarn"} | rope}
    )
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    spec = rope_of(rope)
    assert torch.allclose(frequencies(spec).float(), expected, rtol=2e-6, atol=0.0)
    assert spec.yarn.attention_factor == pytest.approx(factor)


def test_older_fields_beside_a_scaling_say_the_same():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 262144}
    older = rope_of({"type": "yarn"} | scaling, "rope_scaling", rope_theta=1e7, partial_rotary_factor=0.25)
    assert older == rope_of(OFFICIAL | scaling)


def test_table_holds_cosines_and_sines_times_the_attention_factor():
    yarn = YarnSpec(4.0, 64, attention_factor=1.5, beta_fast=32.0, beta_slow=1.0, is_rounded=True)
    table = RotaryTable(RopeSpec(8, 1e4, yarn), CPU)
    table.reserve(300)
    angles = torch.arange(300, dtype=torch.float64)[:, None] * frequencies(table.spec)
    assert torch.equal(table.cos_sin, (torch.cat([angles.cos(), angles.sin()], dim=1) * 1.5).float())


def test_angles_of_far_positions_are_exact():
    """In float32 the first pair's angle would be wrong by a sixteenth at a million."""
    table = RotaryTable(RopeSpec(4, 1e4), CPU)
    table.reserve(1_000_002)
    far = torch.tensor([1_000_001.0, 10_000.01], dtype=torch.float64)
    assert torch.allclose(table.cos_sin[-1].double(), torch.cat([far.cos(), far.sin()]), atol=1e-6)
