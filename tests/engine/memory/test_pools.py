"""Pools from what layers keep: layers that keep alike share tensors, and a snapshot is one row of bytes."""

from __future__ import annotations

import pytest
import torch
from leyden.engine.memory.groups import ALIGNMENT, num_tensors, slot_groups, snapshot_bytes, token_groups
from leyden.engine.memory.pools import DTypes, KVPool, SnapshotPool, StatePool, layer_caches
from leyden.models.mixers.cache import CacheSpec, Part, slot_bytes, token_bytes

CPU = torch.device("cpu")
DTYPES = DTypes(torch.float32, torch.bfloat16)


def lightning(heads: int, K: int, V: int, *more: Part) -> CacheSpec:
    ring = (Part("key", (heads, K), "activation"), Part("value", (heads, V), "activation"))
    return CacheSpec((*more, Part("state", (heads, K, V), "state")), ring, 16)


def softmax(heads: int, dim: int) -> CacheSpec:
    return CacheSpec(token=(Part("key", (heads, dim), "activation"), Part("value", (heads, dim), "activation")))


TAIL = Part("tail", (5, 3), "activation")  # 30 bytes
LATENT = CacheSpec(token=(Part("latent", (24,), "activation"),))
UNIFORM = [lightning(4, 16, 32), softmax(2, 16), lightning(4, 16, 32), lightning(4, 16, 32), softmax(2, 16)]
MIXED = [lightning(4, 16, 32), LATENT, lightning(2, 8, 8, TAIL), softmax(2, 16), lightning(4, 16, 32)]
SUMS = CacheSpec(
    (Part("state", (4, 8, 8), "state"), Part("sum", (3,), "float32")), (Part("decay", (4,), "float32"), TAIL), 16
)
MODELS = {
    "uniform": UNIFORM,
    "mixed": MIXED,
    "states alone": [MIXED[2]],
    "tokens alone": [LATENT],
    "float32 in any case": [SUMS, *MIXED],
    "none": [],
}


def make(caches, *, slots=5, snapshots=6, blocks=7, dtypes=DTYPES, snapshot_dtypes=DTYPES):
    states = StatePool(caches, slots, dtypes, device=CPU)
    kept = SnapshotPool(caches, snapshots, snapshot_dtypes, device=CPU)
    kv = KVPool(caches, blocks, 4, DTYPES, device=CPU)
    return states, kept, kv, layer_caches(caches, states, kept, kv)


def test_a_uniform_model_has_one_tensor_for_each_part():
    states, kept, kv, _ = make(UNIFORM)
    assert [tuple(t.shape) for t in states.tensors] == [(3, 5, 4, 16, 32), (3, 5, 4, 16, 16), (3, 5, 4, 16, 32)]
    assert [tuple(t.shape) for t in kv.tensors] == [(2, 7, 4, 2, 16)] * 2
    (states_kept,) = kept.parts
    assert states_kept.shape == (6, 3, 4, 16, 32) and states_kept.is_contiguous()


def test_layers_that_keep_alike_share_a_group_wherever_they_stand():
    assert [group.layers for group in slot_groups(MIXED)] == [(0, 4), (2,)]
    assert [group.layers for group in token_groups(MIXED)] == [(1,), (3,)]


@pytest.mark.parametrize("caches", MODELS.values(), ids=MODELS)
def test_a_layer_gets_views_of_its_own_shape_and_dtype(caches):
    dtypes, snapshot_dtypes = DTypes(torch.bfloat16, torch.bfloat16), DTypes(torch.float16, torch.bfloat16)
    *_, layers = make(caches, dtypes=dtypes, snapshot_dtypes=snapshot_dtypes)
    for cache, layer in zip(caches, layers, strict=True):
        for part, slot, kept in zip(cache.slot, layer.slot, layer.snapshots, strict=True):
            assert slot.shape == (5, *part.shape) and kept.shape == (6, *part.shape)
            assert (slot.dtype == kept.dtype == torch.float32) is (part.holds == "float32")
            assert (slot.dtype, kept.dtype) == (dtypes.of(part), snapshot_dtypes.of(part))
            assert slot[0].is_contiguous() and kept[0].is_contiguous(), "only the slots' stride is free"
        for part, ring in zip(cache.ring, layer.ring, strict=True):
            assert ring.shape == (5, part.shape[0], 16, *part.shape[1:]) and ring.is_contiguous()
            assert ring.dtype == (torch.float32 if part.holds == "float32" else torch.bfloat16)
        for part, token in zip(cache.token, layer.token, strict=True):
            assert token.shape == (7, 4, *part.shape) and token.is_contiguous()


@pytest.mark.parametrize("caches", MODELS.values(), ids=MODELS)
def test_no_two_layers_share_memory(caches):
    """Each view gets a number of its own; then every element must hold its view's."""
    *_, layers = make(caches)
    views = [view for layer in layers for kind in layer for view in kind]
    for number, view in enumerate(views):
        view.fill_(number)
    assert all((view == number).all() for number, view in enumerate(views))


@pytest.mark.parametrize("caches", MODELS.values(), ids=MODELS)
def test_planned_bytes_are_the_allocated_bytes(caches):
    states, kept, kv, _ = make(caches)
    assert states.nbytes == 5 * slot_bytes(caches, DTYPES.sizes)
    assert kv.nbytes == 7 * 4 * token_bytes(caches, DTYPES.sizes)
    assert kept.nbytes == 6 * snapshot_bytes(caches, DTYPES.sizes)
    assert len(states.tensors) + len(kv.tensors) == num_tensors(caches)


@pytest.mark.parametrize("caches", MODELS.values(), ids=MODELS)
def test_regions_of_a_snapshot_are_aligned_and_end_before_the_next(caches):
    _, kept, *_ = make(caches)
    ends = [region.offset + region.size * kept.dtypes.of(region.part).itemsize for region in kept.regions]
    assert all(region.offset % ALIGNMENT == 0 for region in kept.regions) and kept.row_bytes % ALIGNMENT == 0
    assert all(end <= region.offset for end, region in zip(ends, kept.regions[1:], strict=False))
    assert not ends or ends[-1] <= kept.row_bytes


def test_a_snapshot_goes_to_the_host_as_bytes_and_comes_back_as_parts():
    states, kept, *_ = make(MIXED)
    kept.allocate_on_host(2)
    for tensor in states.tensors:
        tensor.normal_()
    for source, target in zip(states.slot(3), kept[1], strict=True):
        target.copy_(source)
    kept.row(7).copy_(kept.row(1))
    for source, target in zip(kept[7], states.slot(0), strict=True):
        target.copy_(source)
    for tensor in (tensor for group in states.slots for tensor in group):
        assert torch.equal(tensor[:, 0], tensor[:, 3])
    for layer, cache in enumerate(MIXED):
        if cache.slot:
            shapes = [tuple(part.shape) for part in kept.layer(7, layer)]
            assert shapes == [part.shape for part in cache.slot]


def test_blocks_are_copied_in_every_part_of_every_layer():
    *_, kv, _ = make(MIXED)
    for tensor in kv.tensors:
        tensor.normal_()
    before = [tensor.clone() for tensor in kv.tensors]
    kv.copy(torch.tensor([1, 4]), torch.tensor([6, 2]))
    for tensor, old in zip(kv.tensors, before, strict=True):
        expected = old[:, [0, 1, 4, 3, 4, 5, 1]]
        assert torch.equal(tensor, expected)
