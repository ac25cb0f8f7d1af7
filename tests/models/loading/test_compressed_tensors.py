"""Matrices that the library compressed-tensors writes are worth here what they are worth to the library."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from leyden.models.loading.names import Names
from leyden.models.loading.target import Target
from leyden.models.loading.weights import load_weights
from safetensors.torch import save_file
from torch import Tensor

compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")

ROWS, COLUMNS = 256, 128
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4 with zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}),
    "int4 by channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int8 packed": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 128}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8 by channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 by tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 by block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    ),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "mxfp8": ("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
}


def scales(matrix: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What a calibration would find, by the largest items."""
    strategy, size = arguments["strategy"], arguments.get("group_size")
    if strategy == "block":
        parts = matrix.reshape(ROWS // 128, 128, COLUMNS // 128, 128).transpose(1, 2).flatten(2)
    else:
        shapes = {"tensor": (1, 1, -1), "channel": (ROWS, 1, -1)}
        parts = matrix.reshape(shapes.get(strategy, (ROWS, COLUMNS // (size or COLUMNS), -1)))
    bits, is_float = arguments["num_bits"], arguments.get("type") == "float"
    largest = {(8, True): 448.0, (4, True): 6.0}.get((bits, is_float), (1 << (bits - 1)) - 1)
    scale = parts.abs().amax(dim=-1) / largest
    found = {"weight_scale": scale}
    if strategy == "tensor":
        found["weight_scale"] = scale.reshape(1)
    if strategy == "tensor_group":
        total = 448 * 6 / matrix.abs().max()
        stored = (scale * total).to(torch.float8_e4m3fn).float()
        found = {"weight_scale": stored, "weight_global_scale": total.reshape(1)}
    if not arguments.get("symmetric", True):
        found["weight_zero_point"] = torch.randint(-3, 4, scale.shape).to(torch.int8)
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_matrix_is_worth_what_its_writer_says(name, tmp_path):
    torch.manual_seed(1)
    format, arguments = CASES[name]
    matrix = torch.randn(ROWS, COLUMNS)
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments), format=format
    )
    compressor = compressors.BaseCompressor.get_value_from_registry(format)
    tensors = compressor.compress({"weight": matrix} | scales(matrix, arguments), scheme)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format=format, quantization_status="compressed", ignore=["lm_head"]
    )
    fields = json.loads(config.model_dump_json())
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": fields}))
    save_file({f"x.{end}": tensor.contiguous() for end, tensor in tensors.items()}, tmp_path / "model.safetensors")
    view = torch.full((ROWS, COLUMNS), torch.nan)
    load_weights(tmp_path, [Target("x.weight", view)], Names(()), progress=False)
    worth = compressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(view.to(worth.dtype), worth)
    assert (view - matrix).norm() < 0.4 * matrix.norm()
