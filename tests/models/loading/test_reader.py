"""Bytes reach their places whatever the pieces, and nothing moves before everything is known to fit."""

from __future__ import annotations

import json
import re
import struct
import time

import pytest
import torch
from leyden.models.errors import CheckpointError
from leyden.models.loading import reader as weight_reader
from leyden.models.loading.header import StoredTensor, read_header
from leyden.models.loading.names import Names
from leyden.models.loading.reader import BUFFER_BYTES, Match, fill
from leyden.models.loading.target import Cut, Target
from leyden.models.loading.weights import load_weights
from safetensors.torch import save_file

CPU = torch.device("cpu")
AS_STORED = Names(renames=())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def write_raw(path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# -- headers --------------------------------------------------------------------------------------------------


def test_the_header_tells_where_every_tensor_begins(tmp_path):
    path = tmp_path / "mixed.safetensors"
    tensors = {
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 5),
        "byte": torch.arange(7, dtype=torch.uint8),
        "half": random(3, 5, dtype=torch.bfloat16),
        "eight": random(4).to(torch.float8_e4m3fn),
        "long": torch.arange(4),
        "bool": torch.tensor([True, False, True]),
    }
    save_file(tensors, path)
    content = path.read_bytes()
    found = {stored.name: stored for stored in read_header(path)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = found[name]
        assert (stored.dtype, stored.shape, stored.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[stored.offset : stored.offset + stored.nbytes] == expected, name


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "overlap": {"a": entry(), "b": entry(offsets=(4, 12))},
    "the same bytes twice": {"a": entry(), "b": entry()},
    "gap": {"a": entry(), "b": entry(offsets=(12, 20))},
    "outside": {"a": entry(shape=(8,), offsets=(0, 32))},
    "not from the start": {"a": entry(offsets=(4, 12))},
    "less than the shape": {"a": entry(shape=(3,))},
    "more than the shape": {"a": entry(shape=(1,))},
    "backwards": {"a": entry(offsets=(8, 0))},
    "negative": {"a": entry(offsets=(-8, 0))},
    "negative shape": {"a": entry(shape=(-2,))},
    "shape that overflows": {"a": entry(shape=(1 << 33, 1 << 33))},
    "unknown dtype": {"a": entry(dtype="F128")},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "a list": [1, 2],
    "broken text": b'{"a": \xff}',
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_refused_naming_the_file(tmp_path, header):
    path = tmp_path / "evil.safetensors"
    write_raw(path, header, bytes(20))
    with pytest.raises(CheckpointError, match=r"evil\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("length", [9, 1 << 20, 100_000_001, 1 << 40, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_at_once(tmp_path, length):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="readable"):
        read_header(path)


def test_a_type_of_half_a_byte_is_refused_by_name(tmp_path):
    path = tmp_path / "four.safetensors"
    write_raw(path, {"packed": entry(dtype="F4", shape=(4,), offsets=(0, 2))}, bytes(2))
    with pytest.raises(CheckpointError, match="'packed' is F4, of which"):
        read_header(path)


# -- pieces ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[BUFFER_BYTES, 48], ids=["whole", "in pieces"])
def buffers(request, monkeypatch):
    monkeypatch.setattr(weight_reader, "BUFFER_BYTES", request.param)


LAYOUTS = {
    "contiguous": lambda device, dtype: torch.empty(3, 5, 7, device=device, dtype=dtype),
    "rows of a wider one": lambda device, dtype: torch.empty(3, 5, 9, device=device, dtype=dtype)[..., 1:8],
    "part of a fused one": lambda device, dtype: torch.empty(3, 12, 7, device=device, dtype=dtype)[:, 4:9],
    "transposed": lambda device, dtype: torch.empty(7, 5, 3, device=device, dtype=dtype).permute(2, 1, 0),
}


def check_fill(tmp_path, layout, stored_dtype, dtype, device) -> None:
    tensor = random(3, 5, 7, dtype=stored_dtype)
    save_file({"before": random(11, dtype=torch.bfloat16), "x": tensor}, tmp_path / "x.safetensors")
    view = LAYOUTS[layout](device, dtype)
    whole = view if view._base is None else view._base
    whole.fill_(7.0)
    expected = whole.cpu().clone()
    expected.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(tensor)
    arrived: list[int] = []
    stored = next(each for each in read_header(tmp_path / "x.safetensors") if each.name == "x")
    fill([Match(stored, Target("x", view))], device, arrived.append)
    assert torch.equal(whole.cpu(), expected), "wrong items, or items beside the view"
    assert sum(arrived) == tensor.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
def test_every_item_lands_in_its_place_and_none_beside_it(tmp_path, buffers, layout, stored_dtype, dtype):
    check_fill(tmp_path, layout, stored_dtype, dtype, CPU)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
def test_a_sum_with_the_stored_values_is_made_in_the_parameters_dtype(tmp_path, buffers, layout, stored_dtype, dtype):
    tensor = random(3, 5, 7, dtype=stored_dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    view = LAYOUTS[layout](CPU, dtype)
    load_weights(tmp_path, [Target("x", view, plus=1.0)], AS_STORED, progress=False)
    assert torch.equal(view, tensor.to(dtype) + 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored_dtype", DTYPES, ids=str)
def test_every_item_lands_in_its_place_on_a_gpu(tmp_path, buffers, layout, stored_dtype, dtype):
    check_fill(tmp_path, layout, stored_dtype, dtype, torch.device("cuda"))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cut_fills_its_part_of_the_stored_tensor_and_nothing_beside_it(tmp_path, buffers, layout, dtype, dim):
    shape = [3, 5, 7]
    shape[dim] *= 2
    tensor = random(*shape)
    save_file({"before": random(11), "x": tensor}, tmp_path / "x.safetensors")
    for index, part in enumerate(tensor.chunk(2, dim)):
        view = LAYOUTS[layout](CPU, dtype)
        whole = view if view._base is None else view._base
        whole.fill_(7.0)
        expected = whole.clone()
        expected.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(part)
        target = Target("x", view, cut=Cut(dim, index, of=2))
        load_weights(tmp_path, [target], Names((), ignored=re.compile("before")), progress=False)
        assert torch.equal(whole, expected), f"part {index}"


@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_rows_that_a_file_interleaves_reach_the_views_behind_one_another(tmp_path, buffers, stored_dtype, plus):
    """As a projection whose file has a query and a gate for each head in turn."""
    tensor = random(3 * (2 + 1), 5, dtype=stored_dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    query, gate = torch.full((3, 2, 7), 7.0)[..., 1:6], torch.full((3, 1, 5), 7.0)
    first, *behind = (view for head in range(3) for view in (query[head], gate[head]))
    load_weights(tmp_path, [Target("x", first, plus=plus, behind=tuple(behind))], AS_STORED, progress=False)
    heads = tensor.float().view(3, 3, 5) + plus
    assert torch.equal(query, heads[:, :2])
    assert torch.equal(gate, heads[:, 2:])
    assert (query._base[..., [0, 6]] == 7.0).all(), "items beside the views"


def test_views_behind_one_another_that_a_tensor_does_not_fit_are_refused_with_both_shapes(tmp_path):
    save_file({"x": random(7, 3)}, tmp_path / "x.safetensors")
    target = Target("x", torch.empty(4, 3), behind=(torch.empty(4, 3),))
    with pytest.raises(CheckpointError, match=r"\[7, 3\], the config asks for \[8, 3\]"):
        load_weights(tmp_path, [target], AS_STORED, progress=False)


def test_cut_of_rows_reads_its_rows_alone(tmp_path):
    save_file({"x": random(8, 100)}, tmp_path / "x.safetensors")
    (stored,) = read_header(tmp_path / "x.safetensors")
    arrived: list[int] = []
    fill([Match(stored, Target("x", torch.empty(2, 100), cut=Cut(0, 3, of=4)))], CPU, arrived.append)
    assert sum(arrived) == stored.nbytes // 4


def test_cut_of_a_tensor_that_it_does_not_divide_is_refused_with_the_stored_shape(tmp_path):
    save_file({"x": random(7, 3)}, tmp_path / "x.safetensors")
    target = Target("x", torch.empty(4, 3), cut=Cut(0, 0, of=2))
    with pytest.raises(CheckpointError, match=r"\[7, 3\], the config asks for \[8, 3\]"):
        load_weights(tmp_path, [target], AS_STORED, progress=False)


def test_many_files_and_pieces_arrive_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_reader, "BUFFER_BYTES", 256)
    tensors = {f"t{i}": torch.full((100 + i,), float(i)) for i in range(40)}
    for i in range(4):
        save_file(dict(list(tensors.items())[i::4]), tmp_path / f"{i}.safetensors")
    parameters = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    load_weights(tmp_path, [Target(name, view) for name, view in parameters.items()], AS_STORED, progress=False)
    assert all(torch.equal(parameters[name], tensor) for name, tensor in tensors.items())


# -- what goes wrong ------------------------------------------------------------------------------------------

WRONG = {
    "missing": {"a": torch.zeros(4)},
    "unexpected": {"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(4)},
    "shape": {"a": torch.zeros(4), "b": torch.zeros(5)},
    "quantised": {"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.int8)},
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_checkpoint_fails_before_a_byte_is_moved(tmp_path, monkeypatch, kind):
    moved: list[int] = []
    monkeypatch.setattr(weight_reader, "read", lambda *arguments: moved.append(1))
    save_file(WRONG[kind], tmp_path / "x.safetensors")
    a, b = torch.ones(4), torch.ones(4)
    with pytest.raises(CheckpointError, match=kind):
        load_weights(tmp_path, [Target("a", a), Target("b", b)], AS_STORED, progress=False)
    assert moved == []
    assert a.tolist() == b.tolist() == [1.0] * 4


def test_a_file_cut_after_its_header_was_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    (stored,) = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"x\.safetensors ends before byte"):
        fill([Match(stored, Target("x", torch.empty(1000)))], CPU, lambda num_bytes: None)


def test_a_file_that_has_gone_is_an_error(tmp_path):
    stored = StoredTensor(tmp_path / "gone.safetensors", "x", torch.float32, (4,), 8)
    with pytest.raises(CheckpointError, match=r"cannot read .*gone\.safetensors"):
        fill([Match(stored, Target("x", torch.empty(4)))], CPU, lambda num_bytes: None)


def test_after_an_error_the_rest_is_not_read(tmp_path, monkeypatch):
    begun: list[int] = []

    def failing(path, offset, into):
        begun.append(offset)
        if offset == 0:
            raise CheckpointError("broken")
        time.sleep(0.002)

    monkeypatch.setattr(weight_reader, "read", failing)
    target = Target("x", torch.empty(1))
    tensors = (StoredTensor(tmp_path / "x", str(i), torch.float32, (1,), 4 * i) for i in range(2000))
    stored = [Match(tensor, target) for tensor in tensors]
    with pytest.raises(CheckpointError, match="broken"):
        fill(stored, CPU, lambda num_bytes: None)
    assert len(begun) < 2000
