"""Laws of paged softmax attention and of the KV store, against plain attention in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from leyden.kernels import load
from leyden.kernels.attention.decode import num_splits
from leyden.kernels.bundles import Rows
from torch import Tensor

ON_GPU = torch.cuda.is_available()
KERNELS = {name: load(name).attention for name in ("torch", "triton")}
HEAD_DIMS = [16, 64, 96, 128, 256]
GROUPS = [(1, 1), (3, 3), (4, 2), (6, 1), *([(64, 8), (40, 2)] if ON_GPU else [])]
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
BLOCK_SIZE = 16

every_kernel = pytest.mark.parametrize("backend", KERNELS)


@dataclass(frozen=True)
class Case:
    """Rows of queries over caches that hold NaN wherever no row may look; block 0 is such a place. The rows' blocks lie
    in the table in another order, between rows whose block numbers lead out of the cache."""

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    table_rows: Tensor
    query_start_loc: Tensor
    context_lens: Tensor
    scale: float
    out: Tensor
    expected: Tensor

    def rows(self, max_len: int) -> Rows:
        return Rows(self.table_rows, self.context_lens > 0, self.query_start_loc, max_len)


def make_case(
    device: torch.device,
    lengths: list[int],
    contexts: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    D: int = 16,
    dtype: torch.dtype = torch.float32,
    spare_columns: int = 3,
    block_size: int = BLOCK_SIZE,
) -> Case:
    generator = torch.Generator().manual_seed(0)
    totals = [n + c for n, c in zip(lengths, contexts, strict=True)]
    needed = [-(-total // block_size) for total in totals]
    free = (torch.randperm(sum(needed) + 4, generator=generator) + 1).tolist()
    cache = torch.full((2, len(free) + 1, block_size, kv_heads, D), float("nan"), dtype=dtype)
    table = torch.full((2 * len(lengths), max(needed) + spare_columns), 2**31 - 1, dtype=torch.int32)
    table_rows = torch.randperm(len(lengths), generator=generator) * 2 + 1
    wide = torch.randn(sum(lengths), heads, D + 8, generator=generator).to(dtype)
    q = wide[..., :D]
    expected = []
    start = 0
    for row, (n, context, total) in enumerate(zip(lengths, contexts, totals, strict=True)):
        blocks = [free.pop() for _ in range(needed[row])]
        table[table_rows[row], : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        keys, values = torch.randn(2, total, kv_heads, D, generator=generator).to(dtype)
        for t in range(total):
            cache[0, blocks[t // block_size], t % block_size] = keys[t]
            cache[1, blocks[t // block_size], t % block_size] = values[t]
        expected.append(plain_attention(q[start : start + n], keys, values, context, D**-0.5))
        start += n
    return Case(
        wide.to(device)[..., :D],
        cache[0].to(device),
        cache[1].to(device),
        table.to(device),
        table_rows.int().to(device),
        torch.tensor([0, *lengths], device=device).cumsum(0).int(),
        torch.tensor(contexts, dtype=torch.int32, device=device),
        D**-0.5,
        torch.full((start, heads, D), float("nan"), dtype=dtype, device=device),
        torch.cat(expected),
    )


def plain_attention(q: Tensor, keys: Tensor, values: Tensor, context: int, scale: float) -> Tensor:
    """q [n, H, D], keys, values [L, H_kv, D] -> [n, H, D] in float64."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    score = torch.einsum("nhd,lhd->hnl", q.double(), keys) * scale
    position = torch.arange(len(keys))
    score.masked_fill_(position[None, :] > context + torch.arange(len(q))[:, None], float("-inf"))
    return torch.einsum("hnl,lhd->nhd", score.softmax(-1), values)


def prefill(backend: str, case: Case, max_query_len: int) -> Tensor:
    returned = KERNELS[backend].prefill(
        case.q,
        case.key_cache,
        case.value_cache,
        case.block_table,
        case.rows(max_query_len),
        case.context_lens,
        case.scale,
        case.out,
    )
    assert returned is case.out
    return returned


def decode(backend: str, case: Case) -> Tensor:
    returned = KERNELS[backend].decode(
        case.q,
        case.key_cache,
        case.value_cache,
        case.block_table,
        case.rows(1),
        case.context_lens,
        case.scale,
        case.out,
    )
    assert returned is case.out
    return returned


def needs_gpu_for_bf16_dots(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter has no bfloat16 dot")


@every_kernel
@pytest.mark.parametrize("context", [0, 1, 15, 16, 62, 100], ids=lambda n: f"context{n}")
@pytest.mark.parametrize("length", [1, 2, 17, 64, 65, *([300, 1000] if ON_GPU else [])], ids=lambda n: f"n{n}")
def test_a_query_sees_its_history_and_itself(backend, length, context, device, assert_close):
    case = make_case(device, [length, 3], [context, 5], heads=2, kv_heads=1)
    assert_close("out", prefill(backend, case, max(length, 3)), case.expected, 1e-6)


@every_kernel
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_prefill_takes_any_head_dim(backend, D, device, assert_close):
    case = make_case(device, [40, 1], [0, 20], D=D, heads=2)
    assert_close("out", prefill(backend, case, 40), case.expected, 1e-6)


@every_kernel
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_prefill_takes_any_group(backend, heads, kv_heads, device, assert_close):
    case = make_case(device, [20, 1], [7, 20], heads=heads, kv_heads=kv_heads)
    assert_close("out", prefill(backend, case, 20), case.expected, 1e-6)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prefill_in_half_precision_stays_in_its_error_bound(backend, dtype, device, assert_close):
    needs_gpu_for_bf16_dots(backend, dtype)
    case = make_case(device, [65, 1, 30], [0, 62, 100], dtype=dtype, D=64)
    assert_close("out", prefill(backend, case, 65), case.expected, BOUNDS[dtype])


@every_kernel
@pytest.mark.parametrize("block_size", [1, 8, 24, 48, 256])
def test_blocks_may_have_any_size(backend, block_size, device, assert_close):
    # Smaller than a tile of keys, no divisor of one, larger than one.
    case = make_case(device, [40, 1, 7], [0, 60, 300], block_size=block_size, heads=2, kv_heads=1)
    assert_close("prefill", prefill(backend, case, 40), case.expected, 1e-6)
    case = make_case(device, [1, 1], [10, 1100], block_size=block_size, heads=2, kv_heads=1)
    assert_close("decode", decode(backend, case), case.expected, 1e-6)


def test_splits_follow_from_shapes_and_never_outnumber_what_the_device_runs():
    assert [num_splits(8, n) for n in (1, 256, 257, 1024, 1 << 20)] == [1, 1, 2, 4, 64]
    for programs in (1, 8, 60, 512, 2048, 5000):
        splits = num_splits(programs, 1 << 20)
        assert splits in (1, 2, 4, 8, 16, 32, 64)
        assert splits == 1 or splits * programs <= 4096


@every_kernel
def test_empty_rows_are_harmless(backend, device, assert_close):
    case = make_case(device, [0, 20, 0, 1], [30, 7, 0, 0])
    assert_close("out", prefill(backend, case, 20), case.expected, 1e-6)


@every_kernel
@pytest.mark.parametrize("contexts", [[0], [15], [16], [300], [0, 15, 16, 100], [299, 3, 40]], ids=str)
def test_a_decode_query_sees_its_history_and_itself(backend, contexts, device, assert_close):
    case = make_case(device, [1] * len(contexts), contexts)
    assert_close("out", decode(backend, case), case.expected, 1e-6)


@every_kernel
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_decode_takes_any_head_dim(backend, D, device, assert_close):
    case = make_case(device, [1, 1], [40, 3], D=D)
    assert_close("out", decode(backend, case), case.expected, 1e-6)


@every_kernel
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_decode_takes_any_group(backend, heads, kv_heads, device, assert_close):
    case = make_case(device, [1, 1], [40, 3], heads=heads, kv_heads=kv_heads)
    assert_close("out", decode(backend, case), case.expected, 1e-6)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode_in_half_precision_stays_in_its_error_bound(backend, dtype, device, assert_close):
    needs_gpu_for_bf16_dots(backend, dtype)
    case = make_case(device, [1] * 3, [65, 1, 100], dtype=dtype, D=64)
    assert_close("out", decode(backend, case), case.expected, BOUNDS[dtype])


@every_kernel
def test_decode_does_not_depend_on_the_width_of_the_block_table(backend, device, assert_close):
    # A wide table means more splits, most of them past a short row's end.
    case = make_case(device, [1] * 3, [0, 37, 600], spare_columns=200, heads=2, kv_heads=1)
    assert_close("out", decode(backend, case), case.expected, 1e-6)


@every_kernel
@pytest.mark.parametrize("contexts", [[-1], [-1, 20, -1], [300, -1], [-1, -1]], ids=str)
def test_padding_rows_of_decode_write_zeros(backend, contexts, device, assert_close):
    case = make_case(device, [1] * len(contexts), [max(c, 0) for c in contexts])
    case.context_lens.copy_(torch.tensor(contexts))
    for row, context in enumerate(contexts):
        if context < 0:
            case.table_rows[row] = -1
            case.expected[row] = 0.0
    out = decode(backend, case)
    for row, context in enumerate(contexts):
        assert_close(f"row {row}", out[row], case.expected[row], 1e-6)
        assert context >= 0 or out[row].count_nonzero() == 0


@every_kernel
def test_padding_rows_of_prefill_write_zeros(backend, device, assert_close):
    lengths, contexts = [40, 70, 0, 130], [3, -1, -1, -1]
    case = make_case(device, lengths, [max(c, 0) for c in contexts])
    case.context_lens.copy_(torch.tensor(contexts))
    case.table_rows[1:] = -1
    out = prefill(backend, case, max(lengths))
    assert_close("row 0", out[:40], case.expected[:40], 1e-6)
    assert out[40:].count_nonzero() == 0


@every_kernel
def test_prefill_in_chunks_ends_like_decode_and_like_one_prefill(backend, device, assert_close):
    whole = make_case(device, [70], [0])
    out = prefill(backend, whole, 70).clone()
    for start, end in ((0, 33), (33, 64), (64, 69)):
        piece = make_chunk(whole, start, end)
        assert_close(f"{start}..{end}", prefill(backend, piece, end - start), out[start:end], 1e-6)
    assert_close("decode", decode(backend, make_chunk(whole, 69, 70)), out[69:], 1e-6)


def make_chunk(case: Case, start: int, end: int) -> Case:
    device = case.q.device
    return Case(
        case.q[start:end],
        case.key_cache,
        case.value_cache,
        case.block_table,
        case.table_rows,
        torch.tensor([0, end - start], dtype=torch.int32, device=device),
        torch.tensor([start], dtype=torch.int32, device=device),
        case.scale,
        torch.full_like(case.out[start:end], float("nan")),
        case.expected[start:end],
    )


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (20, 1), (18, 18), (4, 20)])
@pytest.mark.parametrize("block_size", [BLOCK_SIZE, 5])
def test_store_writes_the_mapped_slots_and_nothing_else(backend, dtype, heads, kv_heads, block_size, device):
    D, slots = 24, [17, -1, 0, 79, 33, -1, 16]
    projected = torch.randn(len(slots), heads + kv_heads, 3 * D, device=device).to(dtype)
    q, key, value = projected[:, :heads, :D], projected[:, heads:, D : 2 * D], projected[:, heads:, 2 * D :]
    caches = torch.randn(2, 80 // block_size, block_size, kv_heads, D, device=device).to(dtype)
    expected, kept = caches.clone(), projected.clone()
    for t, slot in enumerate(slots):
        if slot >= 0:
            expected[0, slot // block_size, slot % block_size] = key[t]
            expected[1, slot // block_size, slot % block_size] = value[t]
    store_unturned(backend, q, key, value, caches, torch.tensor(slots, device=device))
    assert torch.equal(caches, expected)
    assert torch.equal(projected, kept)


def store_unturned(backend: str, q: Tensor, key: Tensor, value: Tensor, caches: Tensor, slots: Tensor) -> None:
    """All at position 0, where no channel turns."""
    cos_sin = torch.tensor([[1.0, 1.0, 0.0, 0.0]], device=q.device)
    KERNELS[backend].rope_and_store_kv(q, key, value, torch.zeros_like(slots), cos_sin, caches[0], caches[1], slots)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_served_shape_stays_in_its_error_bound(dtype, device, assert_close):
    shape = {"heads": 64, "kv_heads": 8, "D": 128, "dtype": dtype}
    case = make_case(device, [700, 1, 130], [0, 1500, 900], **shape)
    assert_close("prefill", prefill("triton", case, 700), case.expected, BOUNDS[dtype])
    case = make_case(device, [1] * 4, [0, 5000, 900, 2047], **shape)
    assert_close("decode", decode("triton", case), case.expected, BOUNDS[dtype])


@pytest.mark.gpu
def test_cache_blocks_beyond_two_to_the_31_elements_are_addressed(device, assert_close):
    case = make_case(device, [1], [40], kv_heads=8, heads=8, D=128, dtype=torch.bfloat16)
    num_blocks = 2**31 // (BLOCK_SIZE * 8 * 128) + 100
    caches = torch.zeros(2, num_blocks, BLOCK_SIZE, 8, 128, dtype=torch.bfloat16, device=device)
    row = case.table_rows[0].item()
    used = (case.block_table[row] < 2**31 - 1).nonzero()[:, 0]
    table = torch.zeros_like(case.block_table)
    high = num_blocks - 1 - torch.arange(len(used), device=device)
    slots = (high[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)).flatten()
    old = case.block_table[row, used].long()
    key, value = case.key_cache[old].flatten(0, 1), case.value_cache[old].flatten(0, 1)
    store_unturned("triton", torch.zeros_like(key), key, value, caches, slots)
    table[row, used] = high.int()
    moved = Case(
        case.q,
        caches[0],
        caches[1],
        table,
        case.table_rows,
        case.query_start_loc,
        case.context_lens,
        case.scale,
        case.out,
        case.expected,
    )
    assert_close("decode", decode("triton", moved), case.expected, 5e-3)
    assert_close("prefill", prefill("triton", moved, 1), case.expected, 5e-3)


@pytest.mark.gpu
def test_no_kernel_synchronises_with_the_host(device):
    case = make_case(device, [20, 1], [0, 50], dtype=torch.bfloat16, D=64)
    step = make_case(device, [1, 1], [20, 50], dtype=torch.bfloat16, D=64)
    slots = torch.arange(21, device=device)
    q, key, value = torch.randn(3, 21, 2, 64, device=device, dtype=torch.bfloat16)
    cos_sin = torch.randn(21, 32, device=device)

    def everything() -> None:
        KERNELS["triton"].rope_and_store_kv(q, key, value, slots, cos_sin, step.key_cache, step.value_cache, slots)
        prefill("triton", case, 20)
        decode("triton", step)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
