"""What `leyden info` says."""

from __future__ import annotations

import pytest
from engines import engine_config
from leyden.server.describe import describe_model
from tiny_models import FULL, LINEAR, save_minimax


@pytest.mark.parametrize(("backend", "state"), [("auto", "4.1 KB"), ("replay", "12.3 KB")])
def test_the_state_counts_the_rings_beside_it(tmp_path, backend, state):
    save_minimax(tmp_path, heads=4, layer_types=(LINEAR, FULL))
    told = describe_model(engine_config(tmp_path, linear_backend=backend), None)
    assert f"state per sequence {state} in float32" in told
