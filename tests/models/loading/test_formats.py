"""Quantised checkpoints of every published format load bit for bit, in the format that holds them without loss."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from leyden.kernels import load as load_kernels
from leyden.kernels.bundles import Weight
from leyden.models.layers.build import Build
from leyden.models.loading import matrices
from leyden.models.loading.formats.choice import Formats
from leyden.models.loading.names import Names
from leyden.models.loading.target import Target, place
from leyden.models.loading.weights import load_weights
from quantised_checkpoints import FORMATS
from safetensors.torch import save_file

AS_STORED = Names(renames=())
BUILD = Build(load_kernels("torch"), torch.device("cpu"), torch.float32)
ROWS, COLUMNS = 256, 128

every_format = pytest.mark.parametrize("published", FORMATS.values(), ids=FORMATS)


@pytest.fixture(params=[matrices.CHUNK_ITEMS, 1], ids=["whole", "in pieces"], autouse=True)
def _pieces(request, monkeypatch):
    monkeypatch.setattr(matrices, "CHUNK_ITEMS", request.param)


@pytest.fixture
def matrix(rng):
    return torch.randn(ROWS, COLUMNS, generator=rng)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def write(folder, tensors: dict[str, torch.Tensor], config: dict) -> None:
    save_file({f"x{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


def formats(folder) -> Formats:
    return Formats.of_files(folder, AS_STORED, {})


def empty(format, *shape: int) -> Weight:
    weight = BUILD.matrix(format, *shape)
    for tensor in (weight.data, weight.scale, weight.zero):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(255)
    return weight


@every_format
def test_plain_parameter_gets_the_worth_of_a_matrix(published, matrix, tmp_path):
    tensors, worth = published.write(matrix)
    write(tmp_path, tensors, published.config)
    for dtype in (torch.float32, torch.bfloat16):
        view = torch.full((ROWS, COLUMNS), torch.nan, dtype=dtype)
        load_weights(tmp_path, [Target("x.weight", view)], AS_STORED, progress=False)
        assert torch.equal(view, worth.to(dtype))
    assert (worth - matrix).norm() < 0.2 * matrix.norm(), "the writer itself"


@every_format
def test_format_in_memory_holds_the_same_worth(published, matrix, tmp_path):
    tensors, worth = published.write(matrix)
    write(tmp_path, tensors, published.config)
    format = formats(tmp_path).choose("mlp", ["x.weight"], [ROWS], COLUMNS)
    assert format.kind == published.held
    weight = empty(format, ROWS, COLUMNS)
    load_weights(tmp_path, [Target("x.weight", place(weight))], AS_STORED, progress=False)
    assert torch.equal(weight.dequantised(torch.float32), worth)


@every_format
def test_rows_that_a_file_interleaves_reach_their_places(published, matrix, tmp_path):
    """As the projections of Qwen3-Next, for matrices of a format in memory and for plain ones."""
    tensors, worth = published.write(matrix)
    write(tmp_path, tensors, published.config)
    for pieces in ([128, 128], [96, 64, 96]):
        format = formats(tmp_path).choose("mixers", ["x.weight"], pieces, COLUMNS)
        starts = [sum(pieces[:i]) for i in range(len(pieces) + 1)]
        order = list(pairwise(starts))[::-1]  # in memory from the last to the first
        weight = empty(format, ROWS, COLUMNS)
        places, first = {}, 0
        for start, end in order:
            places[start] = place(weight.rows(first, end - start))
            first += end - start
        view, *behind = (places[start] for start in starts[:-1])
        load_weights(tmp_path, [Target("x.weight", view, behind=tuple(behind))], AS_STORED, progress=False)
        expected = torch.cat([worth[start:end] for start, end in order])
        assert torch.equal(weight.dequantised(torch.float32), expected)
