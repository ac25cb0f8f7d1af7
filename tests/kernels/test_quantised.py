"""Matrices in 8 and 4 bits: each item is where the layout says, and products take it for its value."""

from __future__ import annotations

import pytest
import torch
from leyden.kernels import load
from leyden.kernels.bundles import Weight
from leyden.kernels.quantised import pack_int4, quantise_fp8, quantise_int4, quantise_int8, unpack_int4

every_implementation = pytest.mark.parametrize("name", ["torch", "triton"])
MADE = {  # a matrix -> a Weight
    "fp8": lambda matrix, group: Weight(*quantise_fp8(matrix), block=(128, 128)),
    "int8": lambda matrix, group: Weight(*quantise_int8(matrix, group), block=(1, group)),
    "int4": lambda matrix, group: Weight(*quantise_int4(matrix, group), block=(1, group)),
}
LARGEST_ERRORS = {"fp8": 0.03, "int8": 0.007, "int4": 0.1}  # of Gaussian items, as a share of their size


def random_weight(kind: str, shape: tuple[int, ...], rng: torch.Generator, *, group: int = 32) -> Weight:
    """Random bits with random scales."""
    *leading, rows, columns = shape
    by_group = (*leading, rows, columns // group)
    if kind == "fp8":
        scale = torch.rand(*leading, -(-rows // 128), -(-columns // 128), generator=rng)
        return Weight(torch.randn(shape, generator=rng).to(torch.float8_e4m3fn), scale, block=(128, 128))
    if kind == "fp8 by channel":
        scale = torch.rand(*leading, rows, 1, generator=rng)
        return Weight(torch.randn(shape, generator=rng).to(torch.float8_e4m3fn), scale, block=(1, columns))
    scale = torch.rand(by_group, generator=rng).to(torch.bfloat16)
    if kind == "int8":
        return Weight(torch.randint(-127, 128, shape, generator=rng).to(torch.int8), scale, block=(1, group))
    data = torch.randint(-(1 << 31), 1 << 31, (*leading, rows, columns // 8), generator=rng).to(torch.int32)
    zero = torch.randint(-8, 9, by_group, generator=rng).to(torch.int8) if kind == "int4 with zeros" else None
    return Weight(data, scale, zero, (1, group))


KINDS = ("fp8", "fp8 by channel", "int8", "int4", "int4 with zeros")
every_kind = pytest.mark.parametrize("kind", KINDS)


def value(weight: Weight, row: int, column: int) -> float:
    """One item of a matrix [N, K], from its definition."""
    block = row // weight.block[0], column // weight.block[1]
    scale = weight.scale[block].float()
    if weight.format != "int4":
        return (weight.data[row, column].float() * scale).item()
    unit, within = divmod(column, 64)
    nibble = (weight.data[row, 8 * unit + within % 8].item() >> 4 * (within // 8)) & 15
    zero = 0 if weight.zero is None else weight.zero[block].item()
    return (torch.tensor(float(nibble - 8 - zero)) * scale).item()


@every_kind
def test_each_item_is_its_value_times_its_scale(kind, rng):
    weight = random_weight(kind, (130, 192), rng)  # the last blocks of 128 are ragged
    matrix = weight.dequantised(torch.float32)
    assert weight.shape == (130, 192) == tuple(matrix.shape)
    for row in (0, 1, 127, 128, 129):
        assert matrix[row].tolist() == [value(weight, row, column) for column in range(192)]
    assert torch.equal(weight.dequantised(torch.bfloat16), matrix.bfloat16()), "rounded once, at the end"


def test_packing_is_undone_and_fills_each_word(rng):
    values = torch.randint(0, 16, (3, 5, 128), generator=rng).to(torch.uint8)
    words = pack_int4(values)
    assert words.dtype == torch.int32 and words.shape == (3, 5, 16)
    assert torch.equal(unpack_int4(words), values)
    by_column = torch.zeros(1, 64, dtype=torch.uint8)
    by_column[0, 8 * 7 + 3] = 15
    assert pack_int4(by_column).tolist() == [[0, 0, 0, -(1 << 28), 0, 0, 0, 0]]


@every_kind
def test_rows_and_experts_are_views(kind, rng):
    weight = random_weight(kind, (3, 256, 128), rng)
    whole = weight.dequantised(torch.float32)
    part = weight.expert(2).rows(128, 128)
    assert torch.equal(part.dequantised(torch.float32), whole[2, 128:])
    assert part.data.untyped_storage().data_ptr() == weight.data.untyped_storage().data_ptr()
    assert (part.format, part.shape, part.block) == (weight.format, (128, 128), weight.block)


def test_plain_weight_is_its_data_and_others_refuse_to_be(rng):
    matrix = torch.randn(3, 4, generator=rng)
    weight = Weight(matrix)
    assert weight.format == "plain" and weight.plain() is matrix and weight.dequantised(torch.float32) is matrix
    with pytest.raises(NotImplementedError, match="int8 with a scale"):
        random_weight("int8", (4, 64), rng).plain()


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_making_loses_no_more_than_the_format_must(kind, group, rng, assert_close):
    matrix = torch.randn(2, 130, 256, generator=rng)
    matrix[1] *= 1e-3
    weight = MADE[kind](matrix, group)
    assert weight.format == kind and weight.shape == (2, 130, 256)
    for e in range(2):
        assert_close(kind, weight.expert(e).dequantised(torch.float32), matrix[e], LARGEST_ERRORS[kind])


@pytest.mark.parametrize("kind", MADE)
def test_making_keeps_zeros_and_the_largest_items_finite(kind, rng):
    matrix = torch.zeros(128, 128)
    assert MADE[kind](matrix, 64).dequantised(torch.float32).count_nonzero() == 0
    matrix[3, 5] = -3e38
    assert MADE[kind](matrix, 64).dequantised(torch.float32)[3, 5] == pytest.approx(-3e38, rel=0.01)


def test_int4_takes_a_scale_no_worse_than_the_largest_item_would(rng):
    matrix = torch.randn(64, 256, generator=rng)
    groups = matrix.unflatten(-1, (-1, 64))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 7).bfloat16().float()
    nearest = (groups / scale).round().clamp(-8, 7) * scale
    made = MADE["int4"](matrix, 64).dequantised(torch.float32).unflatten(-1, (-1, 64))
    error, bound = ((x - groups).square().sum(dim=-1) for x in (made, nearest))
    assert (error <= bound).all()
    assert error.sum() < 0.75 * bound.sum()


@every_implementation
@every_kind
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 33])
@pytest.mark.parametrize("shape", [(48, 128), (133, 2368)])
def test_product_takes_the_dequantised_matrix(name, kind, num_tokens, shape, device, rng, assert_close):
    weight = random_weight(kind, shape, rng)
    x = torch.randn(num_tokens, shape[1], generator=rng)
    on_device = Weight(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in weight))
    y = load(name).dense.linear(x.to(device), on_device)
    assert_close("y", y, x.double() @ weight.dequantised(torch.float32).double().T, 1e-6)


@every_implementation
@pytest.mark.parametrize(("gate_up", "down"), [("int4", "int8"), ("fp8", "int4 with zeros"), ("fp8 by channel", "fp8")])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_experts_take_their_dequantised_matrices(name, gate_up, down, num_tokens, device, rng, assert_close):
    shapes = {gate_up: (4, 2 * 64, 64), down: (4, 64, 64)}
    weights = [random_weight(kind, shape, rng) for kind, shape in shapes.items()]
    plain = [Weight(weight.dequantised(torch.float32) * 0.1).data for weight in weights]
    scaled = [weight._replace(scale=(weight.scale.float() * 0.1)) for weight in weights]
    x, (shares, experts) = torch.randn(num_tokens, 64, generator=rng), torch.rand(num_tokens, 4, generator=rng).topk(2)
    on_device = [Weight(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in w)) for w in scaled]
    y = load(name).experts.moe(x.to(device), *on_device, shares.to(device), experts.to(device))
    expected = load("torch").experts.moe(x, *map(Weight, plain), shares, experts)
    assert_close("y", y, expected, 1e-5)
