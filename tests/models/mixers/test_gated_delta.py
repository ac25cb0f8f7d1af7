"""A gated delta net driven as the engine drives it, against transformers' module over whole sequences."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import torch
from backends import OF_DELTA
from fla_stand_in import stand_in
from leyden.kernels import load
from leyden.kernels.delta import fla
from leyden.models.errors import CheckpointError
from leyden.models.forward_batch import ForwardBatch
from leyden.models.layers.build import Build
from leyden.models.layers.rotary import RotaryTables
from leyden.models.loading.names import Names
from leyden.models.loading.weights import load_weights
from leyden.models.mixers.backends import LinearBackends
from leyden.models.mixers.cache import CacheSpec, LayerCache, Part
from leyden.models.mixers.delta_backends import DELTA_BACKENDS
from leyden.models.mixers.gated_delta import GatedDeltaNet
from leyden.models.mixers.mixer import MixerBuild
from leyden.models.specs import GatedDeltaSpec
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

HIDDEN, NUM_SLOTS, NUM_SNAPSHOTS, SNAPSHOT_EVERY = 24, 5, 3, 64
EMPTY = torch.empty(0)
SHAPES = {"1 value head": (2, 2, 8, 16), "3 value heads": (2, 6, 8, 8), "4 value heads": (1, 4, 16, 16)}


def ours(shape: str, **fields) -> GatedDeltaSpec:
    key_heads, value_heads, key_dim, value_dim = SHAPES[shape]
    return GatedDeltaSpec(key_heads, value_heads, key_dim, value_dim, norm_eps=1e-6, **fields)


def theirs(spec: GatedDeltaSpec) -> nn.Module:
    """transformers' module of the same shape, with weights that matter: decays from almost none to almost all."""
    config_type, module_type = (
        (Qwen3NextConfig, Qwen3NextGatedDeltaNet) if spec.is_grouped else (Qwen3_5TextConfig, Qwen3_5GatedDeltaNet)
    )
    config = config_type(
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        linear_num_key_heads=spec.num_key_heads,
        linear_num_value_heads=spec.num_value_heads,
        linear_key_head_dim=spec.key_dim,
        linear_value_head_dim=spec.value_dim,
        rms_norm_eps=spec.norm_eps,
    )
    torch.manual_seed(0)
    module = module_type(config, layer_idx=0).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name == "A_log":
            parameter.copy_(torch.linspace(-6.0, 1.0, len(parameter)))
        elif parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    return module


def build(
    spec: GatedDeltaSpec,
    backend: str,
    *,
    speculative: bool = True,
    dtype: torch.dtype = torch.float32,
    kernel_name: str = "torch",
) -> GatedDeltaNet:
    kernels = load(kernel_name)
    backends = LinearBackends({"gated_delta": DELTA_BACKENDS[backend](kernels, speculative=speculative)})
    build = Build(kernels, torch.device("cpu"), dtype)
    return GatedDeltaNet(spec, MixerBuild(HIDDEN, build, RotaryTables(build.device), backends))


def fill(layer: GatedDeltaNet, tensors: dict[str, Tensor], folder) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    load_weights(folder, layer.targets(""), Names(()), progress=False)


@dataclass(eq=False)
class Row:
    """A sequence: the layer's inputs x [n, d], its slot, how far it has come, and the layer's outputs."""

    x: Tensor
    slot: int
    computed: int = 0
    pending: int = 0
    outs: list[Tensor] = field(default_factory=list)


def make_row(num_tokens: int, slot: int, seed: int = 0) -> Row:
    return Row(torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)), slot)


def nan(part: Part, *lead: int) -> Tensor:
    return torch.full((*lead, *part.shape), float("nan"))


def make_cache(spec: CacheSpec) -> LayerCache:
    return LayerCache(
        slot=tuple(nan(part, NUM_SLOTS) for part in spec.slot),
        ring=tuple(
            nan(part._replace(shape=(part.shape[0], spec.ring_size, *part.shape[1:])), NUM_SLOTS) for part in spec.ring
        ),
        snapshots=tuple(nan(part, 2 * NUM_SNAPSHOTS)[::2] for part in spec.slot),
    )


def ints(values: list, *shape: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).reshape(shape or (-1,))


class Driver:
    """A layer with pools of its own."""

    def __init__(self, layer: GatedDeltaNet) -> None:
        self.layer = layer
        self.backend = layer.backend
        self.cache = make_cache(layer.cache)

    @torch.inference_mode()
    def step(
        self,
        prompts: list[tuple[Row, int]],
        decodes: list[Row],
        drafts: list[tuple[Row, int, int]] | None = None,
        snapshots: list[tuple[int, int, int]] | None = None,
    ) -> None:
        """Rows with their numbers of tokens; of a row of drafts (row, m, kept) those behind `kept` are nonsense.
        snapshots: (row, tokens, snapshot)."""
        drafts = drafts or []
        self.fold([row for row, _ in prompts])
        self.fold([row for row, m, _ in drafts if row.pending + m > self.backend.ring_size])
        self.fold([] if self.backend.replays else decodes)
        rows = [row for row, *_ in (*prompts, *drafts)] + decodes
        counts = [m for _, m, *_ in (*prompts, *drafts)] + [1] * len(decodes)
        kept = [m for _, m in prompts] + [n for *_, n in drafts] + [1] * len(decodes)
        x = [row.x[row.computed : row.computed + n] for row, n in zip(rows, kept, strict=True)]
        x = [torch.cat([a, a.new_full((m - len(a), HIDDEN), 9.0)]) for a, m in zip(x, counts, strict=True)]
        context, num_prefills = ints([row.computed for row in rows]), len(prompts) + len(drafts)
        batch = ForwardBatch(
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
            snapshots=ints(snapshots or [], -1, 3),
            num_prefills=num_prefills,
            num_prefill_tokens=sum(counts[:num_prefills]),
            num_decodes=len(decodes),
            max_query_len=max(counts[:num_prefills], default=1),
            num_drafted=len(drafts),
            num_drafted_tokens=sum(m for _, m, _ in drafts),
        )
        out = self.layer(torch.cat(x).to(self.layer.out_proj.weight.dtype), batch, self.cache)
        for i, (row, n, part) in enumerate(zip(rows, kept, out.split(counts), strict=True)):
            row.outs.append(part[:n])
            row.computed += n
            if i < len(prompts):
                row.pending = 0
            elif i < num_prefills:
                row.pending += n
            elif self.backend.replays:
                row.pending = row.pending + 1 if row.pending < self.backend.ring_size - 1 else 0

    def fold(self, rows: list[Row]) -> None:
        """What the engine does before a step that does not read these rows' rings, or needs room there."""
        waiting = [row for row in rows if row.pending]
        if waiting:
            each = ([row.slot for row in waiting], [row.pending for row in waiting], [row.computed for row in waiting])
            self.layer.fold(self.cache, *map(ints, each))
        for row in waiting:
            row.pending = 0

    def copy(self, row: Row, slot: int) -> Row:
        """A fork: what is folded of the row, in another slot."""
        self.fold([row])
        for tensor in self.cache.slot:
            tensor[slot] = tensor[row.slot]
        return Row(row.x, slot, row.computed, outs=[*row.outs])

    def resume(self, row: Row, snapshot: int, num_tokens: int, slot: int) -> Row:
        """A sequence that begins with the first `num_tokens` of another's, of which there is a snapshot."""
        for tensor, kept in zip(self.cache.slot, self.cache.snapshots, strict=True):
            tensor[slot] = kept[snapshot]
        return Row(row.x, slot, num_tokens, outs=[torch.cat(row.outs)[:num_tokens]])


@pytest.fixture(params=OF_DELTA)
def backend(request) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["flat", "grouped"])
def spec(request) -> GatedDeltaSpec:
    return ours("3 value heads", is_grouped=request.param)


@pytest.fixture
def module(spec) -> nn.Module:
    return theirs(spec)


@pytest.fixture
def driver(spec, module, backend, tmp_path) -> Driver:
    layer = build(spec, backend)
    fill(layer, module.state_dict(), tmp_path)
    return Driver(layer)


def check(module: nn.Module, *rows: Row) -> None:
    for row in rows:
        expected = module(row.x[None, : row.computed])[0]
        torch.testing.assert_close(torch.cat(row.outs), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_grouped", [False, True], ids=["flat", "grouped"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 63, 64, 65, 127, 128, 129])
def test_prompt_of_any_length_equals_transformers_and_so_do_the_tokens_after_it(
    shape, is_grouped, num_tokens, backend, tmp_path
):
    spec = ours(shape, is_grouped=is_grouped)
    module, layer, row = theirs(spec), build(spec, backend), make_row(num_tokens + 20, slot=1)
    fill(layer, module.state_dict(), tmp_path)
    driver = Driver(layer)
    driver.step([(row, num_tokens)], [])
    for _ in range(20):
        driver.step([], [row])
    check(module, row)


@pytest.mark.parametrize("cuts", [[1] * 9, [2, 1, 3, 1, 2], [3, 3, 3], [60, 4, 1, 63, 64, 2], [100, 100]], ids=str)
def test_cuts_of_a_prompt_change_nothing(driver, module, cuts):
    row, other = make_row(sum(cuts), slot=3), make_row(sum(cuts), slot=0, seed=1)
    for m in cuts:
        driver.step([(other, m), (row, m)], [])
    check(module, row, other)


@pytest.mark.parametrize("kernel_name", ["torch", "triton"])
def test_mixed_steps_of_prompts_drafts_and_decode_rows(backend, kernel_name, tmp_path):
    spec = ours("4 value heads")
    module, layer = theirs(spec), build(spec, backend, kernel_name=kernel_name)
    fill(layer, module.state_dict(), tmp_path)
    driver = Driver(layer)
    rows = [make_row(150, slot, seed=slot) for slot in range(4)]
    driver.step([(rows[0], 10), (rows[1], 3)], [])
    driver.step([(rows[2], 66)], rows[:2])
    for kept in (1, 4, 2, 4) if kernel_name == "triton" else (1, 4, 2, 3, 4, 1, 4):
        driver.step([(rows[3], 7)], [rows[2]], [(rows[0], 4, kept), (rows[1], 3, 1)])
        driver.step([], [rows[0], rows[3]])
    driver.step([(rows[0], 5), (rows[3], 1)], [rows[1]])
    check(module, *rows)


def test_rejected_drafts_leave_no_trace_and_more_follow_at_once(driver, module):
    row = make_row(120, slot=2)
    driver.step([(row, 5)], [])
    for kept in (1, 8, 1, 8, 3, 8, 8, 2, 1, 1, 5):
        driver.step([], [], [(row, 8, kept)])
    driver.step([(row, 9)], [])
    check(module, row)


def test_slot_of_another_sequence_is_as_good_as_new(driver, module):
    first, second, third = (make_row(90, slot=1, seed=seed) for seed in range(3))
    driver.step([(first, 70)], [])
    for _ in range(5):
        driver.step([], [first])
    driver.step([(second, 1)], [])
    driver.step([], [second])
    driver.step([(third, 2)], [])
    for _ in range(18):
        driver.step([], [third])
    check(module, first, second, third)


@pytest.mark.parametrize("waiting", [0, 1, 5])
def test_fork_goes_on_like_its_source(driver, module, waiting):
    row = make_row(110, slot=0)
    driver.step([(row, 67)], [])
    for _ in range(waiting):
        driver.step([], [row])
    fork = driver.copy(row, slot=4)
    fork.x = torch.cat([fork.x[: fork.computed], make_row(50, slot=4, seed=7).x])
    for _ in range(17):
        driver.step([], [row, fork])
    check(module, row, fork)


@pytest.mark.parametrize("before", [0, 3, 64, 100])
def test_snapshots_on_a_prompts_way_are_its_beginnings(driver, module, before):
    """The places are those that `CacheSpec.snapshot_every` allows; a second row asks for none."""
    assert driver.layer.cache.snapshot_every == SNAPSHOT_EVERY
    row, other = make_row(300, slot=1), make_row(300, slot=2, seed=1)
    if before:
        driver.step([(row, before)], [])
    places = [at for at in (128, 192, 256) if at - before >= 1]
    asked = [(1, at - before, i) for i, at in enumerate(places)]
    driver.step([(other, 200), (row, 270 - before)], [], snapshots=[*asked, (0, 64, -1)])
    for i, at in enumerate(places):
        resumed = driver.resume(row, i, at, slot=0)
        driver.step([(resumed, 1)], [])
        driver.step([(resumed, 9)], [])
        driver.step([], [resumed])
        check(module, resumed)
    driver.step([], [row, other])
    check(module, row, other)


def test_gate_may_be_a_sigmoid(backend, tmp_path):
    """transformers has no such layer: its norm is asked for the other activation."""
    spec = ours("3 value heads", gate_activation="sigmoid")
    module, layer, row = theirs(spec), build(spec, backend), make_row(9, slot=0)
    fill(layer, module.state_dict(), tmp_path)
    module.norm.activation = "sigmoid"
    driver = Driver(layer)
    driver.step([(row, 9)], [])
    check(module, row)


def test_decays_and_the_convolution_are_float32_whatever_the_file_and_the_model_hold(spec, module, tmp_path):
    layer = build(spec, "replay", dtype=torch.bfloat16)
    tensors = {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    fill(layer, tensors, tmp_path)
    found = {target.name: target.view for target in layer.targets("")}
    for name in ("A_log", "dt_bias", "conv1d.weight"):
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensors[name].float())
    assert all(view.dtype == torch.bfloat16 for name, view in found.items() if "proj" in name or "norm" in name)


def test_bfloat16_is_near_to_float32(spec, module, backend, tmp_path):
    layer, row = build(spec, backend, dtype=torch.bfloat16), make_row(100, slot=0)
    fill(layer, module.state_dict(), tmp_path)
    driver = Driver(layer)
    driver.cache = LayerCache(*(tuple(part.bfloat16() for part in parts) for parts in driver.cache))
    driver.cache = driver.cache._replace(slot=(driver.cache.slot[0].float(), driver.cache.slot[1]))
    driver.step([(row, 70)], [])
    for _ in range(20):
        driver.step([], [row])
    expected = module(row.x[None, : row.computed])[0]
    assert (torch.cat(row.outs) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("speculative", [False, True])
def test_cache_is_what_the_layer_needs_to_keep(spec, backend, speculative):
    cache = build(spec, backend, speculative=speculative).cache
    channels = 2 * 2 * 8 + 6 * 8
    assert cache.slot == (Part("state", (6, 8, 8), "state"), Part("tail", (4, channels), "activation"))
    assert cache.token == () and cache.ring_size == (16 if speculative or backend == "replay" else 0)
    assert [part.name for part in cache.ring] == (["key", "correction", "decay", "raw"] if cache.ring_size else [])


@pytest.mark.parametrize("name", ["in_proj_qkvz", "in_proj_ba"])
def test_grouped_tensor_of_a_wrong_shape_is_refused_with_both_shapes(name, tmp_path):
    spec = ours("3 value heads", is_grouped=True)
    tensors = theirs(spec).state_dict()
    right = list(tensors[f"{name}.weight"].shape)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:-1]
    told = re.escape(f"shape {[right[0] - 1, right[1]]}, the config asks for {right}")
    with pytest.raises(CheckpointError, match=told):
        fill(build(spec, "chunk"), tensors, tmp_path)


def test_fla_computes_prompts_decode_rows_and_snapshots_without_a_ring(spec, module, tmp_path, monkeypatch):
    monkeypatch.setattr(fla, "load", stand_in)
    layer = build(spec, "fla")
    fill(layer, module.state_dict(), tmp_path)
    assert layer.cache.ring == () and not layer.backend.prompts_in_graphs
    driver, rows = Driver(layer), [make_row(160, slot, seed=slot) for slot in range(3)]
    driver.step([(rows[0], 10), (rows[1], 3)], [])
    driver.step([(rows[2], 140), (rows[1], 70)], [rows[0]], snapshots=[(0, 64, 2), (0, 128, 0), (1, 61, 1)])
    driver.step([], rows)
    for row, snapshot, at in ((rows[2], 2, 64), (rows[2], 0, 128), (rows[1], 1, 64)):
        resumed = driver.resume(row, snapshot, at, slot=4)
        driver.step([(resumed, 2)], rows[:2])
        driver.step([], [resumed])
        check(module, resumed)
    check(module, *rows)
