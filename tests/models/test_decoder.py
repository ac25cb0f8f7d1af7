"""A decoder of layers that all differ, built from a spec alone, against a recurrence in float64.

No family has such a model: lightning layers of two shapes, two rotations, dense layers, experts, and both ways to add
a shared expert. The reference below is written from the formulas, one token after another. It takes nothing of Leyden
but the weights, by the names of their targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from backends import BACKENDS
from leyden.kernels import load
from leyden.models.decoder import Decoder
from leyden.models.forward_batch import ForwardBatch
from leyden.models.layers.build import Build
from leyden.models.loading.noise import fill_with_noise
from leyden.models.mixers.backends import build_backends
from leyden.models.mixers.cache import CacheSpec, ItemSizes, LayerCache, Part, slot_bytes, token_bytes
from leyden.models.specs import (
    DenseSpec,
    ExpertsSpec,
    LayerSpec,
    LightningSpec,
    ModelSpec,
    NormSpec,
    Residual,
    RopeSpec,
    SharedSpec,
    SoftmaxRoute,
    SoftmaxSpec,
)
from torch import Tensor

VOCAB, HIDDEN, EPS, BLOCK = 30, 24, 1e-5, 4
NUM_SLOTS, NUM_BLOCKS, NUM_SNAPSHOTS = 3, 30, 2
LONGEST = 40

WIDE = LightningSpec(num_heads=2, head_dim=16, slopes=(0.3, 0.01), scale=1.0, norm_eps=1e-6)
NARROW = LightningSpec(num_heads=4, head_dim=8, slopes=(0.5, 0.1, 0.02, 0.004), scale=0.5, norm_eps=1e-6)
PARTIAL = SoftmaxSpec(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeSpec(dim=4, theta=1000.0))
WHOLE = SoftmaxSpec(
    num_heads=2,
    num_kv_heads=1,
    head_dim=12,
    rope=RopeSpec(dim=12, theta=500.0),
    qk_norm=NormSpec(EPS, is_zero_centred=True),
    has_gate=True,
)
EXPERTS = ExpertsSpec(width=12, num_experts=3, top_k=2, route=SoftmaxRoute())
ADDED, MIXED, GATED = SharedSpec(10, "added"), SharedSpec(6, "mixed"), SharedSpec(4, "gated")
SPEC = ModelSpec(
    architecture="none",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    layers=(
        LayerSpec(WIDE, DenseSpec(20), Residual(1.3, 0.8), Residual(1.1, 0.9)),
        LayerSpec(NARROW, EXPERTS, Residual(1.0, 1.0), Residual(1.0, 1.0), ADDED),
        LayerSpec(PARTIAL, DenseSpec(16), Residual(1.0, 0.7), Residual(0.9, 1.0), MIXED),
        LayerSpec(WHOLE, EXPERTS, Residual(1.0, 1.0), Residual(1.0, 1.0)),
        LayerSpec(NARROW, EXPERTS, Residual(1.0, 1.0), Residual(1.0, 1.0), MIXED),
        LayerSpec(PARTIAL, DenseSpec(8), Residual(1.0, 1.0), Residual(1.0, 1.0), GATED),
    ),
    norm=NormSpec(EPS),
    postnorm=False,
    tie_word_embeddings=False,
    max_model_len=LONGEST,
    eos_token_ids=(),
    dtype=None,
)


def build(backend: str = "auto", device: str = "cpu") -> Decoder:
    kernels = load("torch")
    return Decoder(SPEC, Build(kernels, torch.device(device), torch.float32), build_backends(backend, SPEC, kernels))


# -- the reference --------------------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


class Reference:
    """One sequence, token by token."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.states: dict[int, Tensor] = {}
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        self.position = 0

    def w(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"]

    def feed(self, token: int) -> Tensor:
        """Logits after `token`."""
        h = self.w("embed_tokens")[token]
        for i, spec in enumerate(SPEC.layers):
            layer = f"layers.{i}"
            mix = self.lightning if isinstance(spec.mixer, LightningSpec) else self.attention
            x = mix(rms(h, self.w(f"{layer}.input_layernorm"), EPS), i, spec.mixer, f"{layer}.self_attn")
            h = spec.mixer_residual.alpha * h + spec.mixer_residual.beta * x
            x = rms(h, self.w(f"{layer}.post_attention_layernorm"), EPS)
            h = spec.mlp_residual.alpha * h + spec.mlp_residual.beta * self.feed_forward(x, spec, layer)
        self.position += 1
        return self.w("lm_head") @ rms(h, self.w("norm"), EPS)

    def lightning(self, x: Tensor, i: int, spec: LightningSpec, name: str) -> Tensor:
        qkv = torch.nn.functional.silu(self.w(f"{name}.qkv_proj") @ x).view(spec.num_heads, 3 * spec.head_dim)
        q, k, v = qkv.split(spec.head_dim, dim=1)
        decay = torch.exp(-torch.tensor(spec.slopes, dtype=torch.float64))[:, None, None]
        state = self.states.get(i, torch.zeros(1, dtype=torch.float64))
        self.states[i] = decay * state + k[:, :, None] * v[:, None, :]
        out = spec.scale * torch.einsum("hk,hkv->hv", q, self.states[i]).flatten()
        gate = torch.sigmoid(self.w(f"{name}.output_gate") @ x)
        return self.w(f"{name}.out_proj") @ (rms(out, self.w(f"{name}.norm"), spec.norm_eps) * gate)

    def attention(self, x: Tensor, i: int, spec: SoftmaxSpec, name: str) -> Tensor:
        q, gate = (self.w(f"{name}.q_proj") @ x).view(spec.num_heads, -1), torch.tensor(torch.inf)
        k = (self.w(f"{name}.k_proj") @ x).view(spec.num_kv_heads, -1)
        if spec.has_gate:
            q, gate = q.chunk(2, dim=1)
        if spec.qk_norm is not None:
            q, k = (rms(y, self.w(f"{name}.{kind}_norm"), spec.qk_norm.eps) for y, kind in ((q, "q"), (k, "k")))
        q, k = self.rotate(q, spec.rope), self.rotate(k, spec.rope)
        self.keys.setdefault(i, []).append(k)
        self.values.setdefault(i, []).append((self.w(f"{name}.v_proj") @ x).view(spec.num_kv_heads, -1))
        group = spec.num_heads // spec.num_kv_heads
        keys = torch.stack(self.keys[i]).repeat_interleave(group, dim=1)
        values = torch.stack(self.values[i]).repeat_interleave(group, dim=1)
        p = torch.einsum("hd,nhd->hn", q, keys).mul(spec.head_dim**-0.5).softmax(dim=-1)
        out = torch.einsum("hn,nhd->hd", p, values) * torch.sigmoid(gate)
        return self.w(f"{name}.o_proj") @ out.flatten()

    def rotate(self, x: Tensor, rope: RopeSpec) -> Tensor:
        half = rope.dim // 2
        angle = self.position * rope.theta ** (-2 * torch.arange(half, dtype=torch.float64) / rope.dim)
        a, b, rest = x[:, :half], x[:, half : rope.dim], x[:, rope.dim :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=1)

    def feed_forward(self, x: Tensor, spec: LayerSpec, layer: str) -> Tensor:
        y = self.gated(x, f"{layer}.mlp") if isinstance(spec.mlp, DenseSpec) else self.moe(x, f"{layer}.mlp")
        if spec.shared is None:
            return y
        shared = self.gated(x, f"{layer}.shared_mlp")
        if spec.shared.joining == "added":
            return y + shared
        c = torch.sigmoid(self.w(f"{layer}.coefficient") @ x)
        return (1 - c) * y + c * shared if spec.shared.joining == "mixed" else y + c * shared

    def moe(self, x: Tensor, name: str) -> Tensor:
        p, best = (self.w(f"{name}.gate") @ x).softmax(dim=0).topk(EXPERTS.top_k)
        return sum(w / p.sum() * self.gated(x, f"{name}.experts.{e}") for w, e in zip(p, best.tolist(), strict=True))

    def gated(self, x: Tensor, name: str) -> Tensor:
        gate, up = self.w(f"{name}.gate_proj") @ x, self.w(f"{name}.up_proj") @ x
        return self.w(f"{name}.down_proj") @ (torch.nn.functional.silu(gate) * up)


# -- the decoder, driven as the engine drives it --------------------------------------------------------------


def make_caches(specs: list[CacheSpec]) -> list[LayerCache]:
    """Tensors for what the specs say, full of NaN."""

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"))

    return [
        LayerCache(
            slot=tuple(nan(NUM_SLOTS, *part.shape) for part in spec.slot),
            ring=tuple(nan(NUM_SLOTS, part.shape[0], spec.ring_size, *part.shape[1:]) for part in spec.ring),
            token=tuple(nan(NUM_BLOCKS, BLOCK, *part.shape) for part in spec.token),
            snapshots=tuple(nan(NUM_SNAPSHOTS, *part.shape) for part in spec.slot),
        )
        for spec in specs
    ]


@dataclass(eq=False)
class Row:
    """A sequence: its tokens, its slot, how far it has come, and its logits after every step."""

    tokens: list[int]
    slot: int
    computed: int = 0
    pending: int = 0
    logits: dict[int, Tensor] = field(default_factory=dict)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Driver:
    """A decoder with pools of its own. Slot s has blocks s, s + NUM_SLOTS, ..."""

    def __init__(self, backend: str) -> None:
        self.model = build(backend)
        fill_with_noise(self.model.parameters(), std=0.4)
        self.model.reserve_positions(LONGEST)
        self.caches = make_caches(self.model.caches)
        self.ring_size = max(spec.ring_size for spec in self.model.caches)
        self.table = torch.arange(NUM_BLOCKS, dtype=torch.int32).view(-1, NUM_SLOTS).T.contiguous()

    def weights(self) -> dict[str, Tensor]:
        return {target.name: target.view.detach().double() for target in self.model.targets() if not target.covers}

    @torch.inference_mode()
    def step(self, prefills: list[tuple[Row, int]], decodes: list[Row], snapshots: tuple = ()) -> None:
        """`snapshots`: (row, tokens, snapshot) each."""
        work = prefills + [(row, 1) for row in decodes]
        waiting = [row for row, _ in prefills if row.pending]
        if waiting:
            each = ([row.slot for row in waiting], [row.pending for row in waiting], [row.computed for row in waiting])
            self.model.fold_pending(self.caches, *map(ints, each))
            for row in waiting:
                row.pending = 0
        places = [(row, i) for row, count in work for i in range(row.computed, row.computed + count)]
        starts = [sum(count for _, count in work[:i]) for i in range(len(work) + 1)]
        context = ints([row.computed for row, _ in work])
        batch = ForwardBatch(
            input_ids=torch.tensor([row.tokens[i] for row, i in places]),
            positions=torch.tensor([i for _, i in places]),
            query_start_loc=ints(starts),
            context_lens=context,
            has_initial_state=context > 0,
            state_indices=ints([row.slot for row, _ in work]),
            num_pending=ints([row.pending for row, _ in work]),
            slot_mapping=torch.tensor([int(self.table[row.slot, i // BLOCK]) * BLOCK + i % BLOCK for row, i in places]),
            block_table=self.table,
            logits_indices=torch.tensor(starts[1:]) - 1,
            snapshots=torch.tensor(snapshots, dtype=torch.int32).view(-1, 3),
            num_prefills=len(prefills),
            num_prefill_tokens=sum(count for _, count in prefills),
            num_decodes=len(decodes),
            max_query_len=max([count for _, count in prefills], default=1),
        )
        logits = self.model.compute_logits(self.model(batch, self.caches)[batch.logits_indices])
        for (row, count), line in zip(work, logits, strict=True):
            row.computed += count
            row.logits[row.computed] = line
        for row in decodes if self.model.layers[0].mixer.backend.replays else []:
            row.pending = row.pending + 1 if row.pending < self.ring_size - 1 else 0

    def check(self, row: Row) -> None:
        reference = Reference(self.weights())
        for n, token in enumerate(row.tokens[: row.computed], start=1):
            expected = reference.feed(token)
            if n in row.logits:
                error = (row.logits[n].double() - expected).norm() / expected.norm()
                assert error < 1e-4, f"after {n} tokens: error {error:.1e}"


def make_row(slot: int, seed: int) -> Row:
    return Row(torch.randint(VOCAB, (LONGEST,), generator=torch.Generator().manual_seed(seed)).tolist(), slot)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_different_shapes_compute_the_recurrence_in_chunks_and_mixed_steps(backend):
    driver = Driver(backend)
    first, second = make_row(1, seed=1), make_row(2, seed=2)
    driver.step([(first, 5)], [])
    for _ in range(3):
        driver.step([], [first])
    driver.step([(first, 2), (second, 7)], [])
    for _ in range(20):  # more than a ring has places
        driver.step([], [second, first])
    driver.step([(second, 3)], [first])
    driver.check(first)
    driver.check(second)
    third = make_row(1, seed=3)  # in the slot of another, with tokens in its ring
    driver.step([(third, 1)], [second])
    driver.step([], [third])
    driver.check(third)


@pytest.mark.parametrize("backend", BACKENDS)
def test_snapshot_holds_all_that_a_layer_keeps_in_a_slot(backend):
    driver = Driver(backend)
    row = make_row(0, seed=4)
    driver.step([(row, 11)], [], snapshots=((0, 8, 1),))
    again = Row(row.tokens, slot=2, computed=8)
    for cache in driver.caches:
        for slot, snapshot in zip(cache.slot, cache.snapshots, strict=True):
            slot[again.slot] = snapshot[1]
        for blocks in cache.token:
            blocks[driver.table[again.slot].long()] = blocks[driver.table[row.slot].long()]
    driver.step([(again, 4)], [])
    driver.check(again)


# -- what the engine asks before there is a model -------------------------------------------------------------


def test_caches_differ_by_layer_and_are_told_on_the_meta_device():
    for backend, ring_size in (("minimax", 0), ("replay", 16)):
        caches = build(backend, "meta").caches
        states = [[part.shape for part in cache.slot] for cache in caches]
        assert states == [[(2, 16, 16)], [(4, 8, 8)], [], [], [(4, 8, 8)], []]
        ring = (Part("key", (4, 8), "activation"), Part("value", (4, 8), "activation"))
        assert caches[1].ring == (ring if ring_size else ())
        assert [cache.ring_size for cache in caches] == [ring_size, ring_size, 0, 0, ring_size, 0]
        tokens = [[part.shape for part in cache.token] for cache in caches]
        assert tokens == [[], [], [(2, 8)] * 2, [(1, 12)] * 2, [], [(2, 8)] * 2]


def test_bytes_follow_from_what_layers_keep():
    caches, sizes = build("replay", "meta").caches, ItemSizes(state=4, activation=2)
    states, kept = 2 * 16 * 16 + 2 * 4 * 8 * 8, 16 * 2 * (2 * 16 + 2 * 4 * 8)
    assert slot_bytes(caches, sizes) == 4 * states + 2 * kept
    assert token_bytes(caches, sizes) == 2 * 2 * (2 * 8 + 12 + 2 * 8)


def test_layers_that_rotate_alike_share_a_table():
    model = build("auto", "cpu")
    assert [table.spec for table in model.rotary] == [PARTIAL.rope, WHOLE.rope]
    assert model.layers[2].mixer.rotary is model.layers[5].mixer.rotary
    model.reserve_positions(7)
    assert [tuple(table.cos_sin.shape) for table in model.rotary] == [(7, 4), (7, 12)]
    assert model.position_bytes(7) == build("auto", "meta").position_bytes(7) == 7 * (4 + 12) * 4


def test_layers_are_counted_by_kind():
    assert SPEC.layer_counts == {"lightning": 3, "softmax": 3}
