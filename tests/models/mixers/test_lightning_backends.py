"""Every linear backend through the life of a sequence: chunks, decoding, chunks again, slots that had other owners."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import get_args

import pytest
import torch
from backends import BACKENDS, PlainBackend
from leyden.configs.schema import LinearBackendName
from leyden.kernels import load
from leyden.kernels.bundles import Ring, Rows
from leyden.kernels.lightning.reference import recurrence
from leyden.models.forward_batch import ForwardBatch
from leyden.models.mixers.backends import LINEAR_BACKENDS
from leyden.models.mixers.cache import LayerCache
from leyden.models.mixers.lightning_backends import LIGHTNING_BACKENDS, LightningCall
from torch import Tensor

HEADS, DIM = 2, 16
EMPTY = torch.empty(0)


@dataclass(eq=False)
class Row:
    """A sequence: all of its tokens' q, k, v [n, H, D], and how far it has come."""

    qkv: Tensor
    slot: int
    computed: int = 0
    pending: int = 0
    outs: list[Tensor] = field(default_factory=list)


def make_row(num_tokens: int, slot: int) -> Row:
    generator = torch.Generator().manual_seed(num_tokens)
    return Row(torch.randn(num_tokens, HEADS, 3 * DIM, generator=generator), slot)


def tokens(row: Row, count: int, kept: int) -> Tensor:
    """The row's next `kept` tokens, and nonsense up to `count`: [count, H, 3 D]."""
    own = row.qkv[row.computed : row.computed + kept]
    return torch.cat([own, own.new_full((count - kept, *own.shape[1:]), 100.0)])


class Layer:
    """One layer's states with a backend on top, driven as the engine drives it."""

    def __init__(self, backend: str, kernels: str, device: str, *, speculative: bool = False) -> None:
        self.device = device
        make = PlainBackend if backend == "plain" else LIGHTNING_BACKENDS[backend]
        self.kernels = load(kernels)
        self.backend = make(self.kernels, speculative=speculative)
        ring = self.backend.ring_size
        state, key, value = (
            torch.full((6, HEADS, size, DIM), float("nan"), device=device) for size in (DIM, ring, ring)
        )
        self.cache = LayerCache(slot=(state,), ring=(key, value) if ring else ())
        self.slopes = torch.tensor([0.3, 0.004], device=device)

    def step(
        self, prefills: list[tuple[Row, int]], decodes: list[Row], drafts: list[tuple[Row, int, int]] | None = None
    ) -> None:
        """Rows with their numbers of tokens; of a row of drafts (row, m, kept) those behind `kept` are nonsense."""
        drafts = drafts or []
        work = prefills + [(row, m) for row, m, _ in drafts] + [(row, 1) for row in decodes]
        rows, counts = [row for row, _ in work], [count for _, count in work]
        kept = counts.copy()
        kept[len(prefills) : len(prefills) + len(drafts)] = [n for _, _, n in drafts]
        self.fold([row for row, _ in prefills])
        self.fold([row for row, m, _ in drafts if row.pending + m > self.backend.ring_size])
        self.fold([] if self.backend.replays else decodes)
        qkv = torch.cat([tokens(row, count, n) for row, count, n in zip(rows, counts, kept, strict=True)])
        q, k, v = qkv.to(self.device).split(DIM, -1)
        out = torch.full((len(qkv), HEADS, DIM), float("nan"), device=self.device)
        batch = self.batch(rows, counts, len(prefills), len(drafts))
        call = LightningCall(q, k, v, self.slopes, DIM**-0.5, self.cache, batch, out)
        assert self.backend.forward(call) is out
        verified = [row for row, _, _ in drafts]
        for row, n, part in zip(rows, kept, out.cpu().split(counts), strict=True):
            row.outs.append(part[:n])
            row.computed += n
            if row in verified:
                row.pending += n
            elif row in decodes and self.backend.replays:
                row.pending = row.pending + 1 if row.pending < self.backend.ring_size - 1 else 0
            else:
                row.pending = 0

    def fold(self, rows: list[Row]) -> None:
        """What the engine does before a step that does not read these rows' rings, or needs room there."""
        if rows and self.backend.ring_size:
            slots = torch.tensor([row.slot for row in rows], dtype=torch.int32, device=self.device)
            pending = torch.tensor([row.pending for row in rows], dtype=torch.int32, device=self.device)
            self.kernels.lightning.fold(self.slopes, self.cache.slot[0], Ring(*self.cache.ring, pending), slots)
        for row in rows:
            row.pending = 0

    def batch(self, rows: list[Row], counts: list[int], num_prompts: int, num_drafted: int) -> ForwardBatch:
        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        num_prefills = num_prompts + num_drafted
        drafts = slice(num_prompts, num_prefills)
        context = ints([row.computed for row in rows])
        return ForwardBatch(
            input_ids=EMPTY,
            positions=EMPTY,
            query_start_loc=ints([sum(counts[:i]) for i in range(len(counts) + 1)]),
            context_lens=context,
            has_initial_state=context > 0,
            state_indices=ints([row.slot for row in rows]),
            num_pending=ints([row.pending for row in rows]),
            slot_mapping=EMPTY,
            block_table=EMPTY,
            logits_indices=EMPTY,
            snapshots=EMPTY,
            num_prefills=num_prefills,
            num_prefill_tokens=sum(counts[:num_prefills]),
            num_decodes=len(rows) - num_prefills,
            max_query_len=max(counts[:num_prefills], default=1),
            num_drafted=num_drafted,
            num_drafted_tokens=sum(counts[drafts]),
        )

    def check(self, row: Row) -> None:
        """All outputs so far, against the recurrence over the whole sequence."""
        one = torch.tensor([0, row.computed])
        q, k, v = row.qkv[: row.computed].split(DIM, -1)
        nothing = torch.zeros(1, HEADS, DIM, DIM)
        rows = Rows(torch.tensor([0]), torch.tensor([False]), one, row.computed)
        expected, _ = recurrence(q, k, v, self.slopes.cpu(), DIM**-0.5, nothing, rows)
        error = (torch.cat(row.outs).double() - expected).norm() / expected.norm()
        assert error < 1e-6, f"error {error:.1e}"


IMPLEMENTATIONS = [("torch", "cpu"), ("triton", "cpu"), pytest.param(("triton", "cuda"), marks=pytest.mark.gpu)]


@pytest.fixture(params=IMPLEMENTATIONS, ids=str)
def place(request) -> tuple[str, str]:
    if request.param == ("triton", "cpu") and torch.cuda.is_available():
        pytest.skip("interpreted only where there is no GPU")
    return request.param


@pytest.fixture(params=[*BACKENDS, "plain"])
def layer(request, place) -> Layer:
    return Layer(request.param, *place)


@pytest.fixture(params=[*BACKENDS, "plain"])
def speculating(request, place) -> Layer:
    layer = Layer(request.param, *place, speculative=True)
    if not layer.backend.ring_size:
        pytest.skip("a backend without a ring has no rows with drafts")
    return layer


class Recorder:
    """Kernels that only say which of them was called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    @property
    def lightning(self) -> Recorder:
        return self

    def __getattr__(self, name: str):
        return lambda *_: self.called.append(name)


@pytest.mark.parametrize(
    ("heads", "prompts", "decodes", "expected"),
    [
        (64, [8192], 0, ["seg_la"]),
        (16, [8192], 0, ["minimax"]),
        (16, [4096] * 2, 0, ["minimax"]),
        (16, [4096] * 3, 0, ["seg_la"]),
        (16, [1023], 0, ["seg_la"]),
        (16, [1024], 0, ["minimax"]),
        (16, [8192], 5, ["minimax", "replay"]),
        (64, [2048] * 4, 60, ["seg_la", "replay"]),
        (16, [], 7, ["replay"]),
    ],
)
def test_auto_chooses_by_shape_and_replays(heads, prompts, decodes, expected):
    kernels = Recorder()
    tokens = sum(prompts)
    some = torch.zeros(len(prompts) + decodes + 1, dtype=torch.int32)
    batch = ForwardBatch(
        *[some] * 11,
        num_prefills=len(prompts),
        num_prefill_tokens=tokens,
        num_decodes=decodes,
        max_query_len=max(prompts, default=1),
    )
    q = torch.empty(tokens + decodes, heads, 1)
    cache = LayerCache(slot=(q,), ring=(q, q))
    LIGHTNING_BACKENDS["auto"](kernels).forward(LightningCall(q, q, q, q, 1.0, cache, batch, q))
    assert kernels.called == expected


def test_chunks_decode_steps_and_chunks_after_them(layer):
    row = make_row(60, slot=4)
    for count in (9, 1, 5):
        layer.step([(row, count)], [])
    for _ in range(7):
        layer.step([], [row])
    layer.step([(row, 6)], [])  # a chunk after decoding: tokens may be waiting in the ring
    layer.step([(row, 1)], [])
    for _ in range(19):  # more than a ring
        layer.step([], [row])
    layer.step([(row, 3)], [])
    layer.check(row)


def test_mixed_batches_and_a_slot_with_a_new_owner(layer):
    first, second = make_row(40, slot=1), make_row(45, slot=3)
    layer.step([(first, 20)], [])
    for _ in range(3):
        layer.step([], [first])
    layer.step([(second, 12)], [first])
    for _ in range(5):
        layer.step([], [second, first])
    layer.check(first)
    third = make_row(30, slot=1)  # first is gone, in the middle of its ring
    layer.step([(third, 1)], [second])
    for _ in range(18):
        layer.step([], [third, second])
    layer.check(second)
    layer.check(third)


def test_a_preempted_sequence_is_computed_again_in_another_slot(layer):
    row = make_row(30, slot=0)
    layer.step([(row, 10)], [])
    for _ in range(4):
        layer.step([], [row])
    again = make_row(30, slot=5)
    layer.step([(again, 14)], [])
    for _ in range(5):
        layer.step([], [again])
    layer.check(again)
    assert torch.allclose(torch.cat(row.outs), torch.cat(again.outs)[:14], atol=1e-5)


def test_setting_names_every_backend_of_the_table():
    assert set(get_args(LinearBackendName)) == {name for backends in LINEAR_BACKENDS.values() for name in backends}


def test_backends_have_rings_where_they_replay_or_may_verify_drafts():
    for name in ("minimax", "seg_la", "replay", "auto"):
        make = LIGHTNING_BACKENDS[name]
        assert make(load("torch")).ring_size == (16 if make(load("torch")).replays else 0)
        assert make(load("torch"), speculative=True).ring_size == 16


def test_every_number_of_drafts_and_of_kept_ones(speculating):
    for m in (1, 7, 16):
        for kept in {1, m // 2 + 1}:
            row = make_row(60, slot=2)
            speculating.step([(row, 6)], [])
            speculating.step([], [], [(row, m, kept)])
            speculating.step([], [], [(row, 5, 2)])
            speculating.step([], [row])
            speculating.step([], [], [(row, m, kept)])
            speculating.step([(row, 4)], [])
            speculating.step([], [row])
            speculating.check(row)


def test_batches_of_all_three_kinds(speculating):
    rng = random.Random(0)
    running = [make_row(90 + slot, slot) for slot in range(4)]
    finished = []
    while running:
        prefills, decodes, drafts = [], [], []
        for row in running:
            left = len(row.qkv) - row.computed
            kind = rng.choice(["prefill", "decode", "verify", "verify", "wait"]) if row.computed else "prefill"
            if kind == "prefill":
                prefills.append((row, min(rng.randint(1, 12), left)))
            elif kind == "decode":
                decodes.append(row)
            elif kind == "verify":
                m = rng.randint(1, 8)
                drafts.append((row, m, min(rng.randint(1, m), left)))
        if prefills or decodes or drafts:
            speculating.step(prefills, decodes, drafts)
        done = [row for row in running if row.computed == len(row.qkv)]
        finished += done
        running = [row for row in running if row not in done]
    for row in finished:
        speculating.check(row)


def test_drafts_alone_and_beside_one_other_kind(speculating):
    first, second = make_row(50, slot=1), make_row(51, slot=4)
    speculating.step([(first, 5), (second, 9)], [])
    speculating.step([], [], [(first, 6, 3), (second, 4, 4)])
    speculating.step([], [second], [(first, 8, 8)])
    speculating.step([(first, 4)], [], [(second, 8, 1)])  # what waits for first is folded, for second it stays
    speculating.step([], [first, second])
    speculating.step([], [first], [(second, 12, 12)])
    speculating.check(first)
    speculating.check(second)


@pytest.mark.parametrize("name", ["minimax", "seg_la", "replay"])
def test_each_kind_of_row_has_its_own_operation(name):
    kernels = Recorder()
    layer = Layer(name, "torch", "cpu", speculative=True)
    backend = LIGHTNING_BACKENDS[name](kernels, speculative=True)
    row = make_row(20, slot=0)
    row.computed, row.pending = 5, 9
    batch = layer.batch([row], [7], 0, 1)
    q = torch.empty(7, HEADS, DIM)
    backend.forward(LightningCall(q, q, q, q, 1.0, layer.cache, batch, q))
    assert kernels.called == ["verify"]
    kernels.called.clear()
    backend.forward(LightningCall(q, q, q, q, 1.0, layer.cache, layer.batch([row], [1], 0, 0), q))
    assert kernels.called == {"minimax": ["decode"], "seg_la": ["seg_la"], "replay": ["replay"]}[name]
