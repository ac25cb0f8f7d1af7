"""On a GPU: memory stays within the configured share at the fullest, and the capacity told at start is there."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from backends import BACKENDS
from engines import request
from leyden.configs.schema import EngineConfig
from leyden.engine.core import EngineCore
from leyden.engine.errors import ConfigError
from leyden.engine.scheduling.speculation import can_draft
from leyden.engine.startup.device_memory import free_memory
from leyden.engine.startup.trial_steps import DEMANDING

pytestmark = pytest.mark.gpu

CONFIG = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "attn_type_list": [0, 1] * 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 10000,
    "intermediate_size": 1024,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "postnorm": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "layernorm_linear_attention_alpha": 1,
    "layernorm_linear_attention_beta": 1,
    "layernorm_full_attention_alpha": 1,
    "layernorm_full_attention_beta": 1,
    "layernorm_mlp_alpha": 1,
    "layernorm_mlp_beta": 1,
}
GIGABYTES = 5  # for one engine; its KV cache would take 34 GB if it could


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture(autouse=True)
def whole_device():
    """Nothing of an engine before is left, and no bound."""
    gc.collect()
    free_memory(torch.device("cuda"))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    free_memory(torch.device("cuda"))


def make(folder: Path, *, gigabytes: float = GIGABYTES, **settings) -> EngineCore:
    """An engine that may take so much beside what is on the device already."""
    free, total = torch.cuda.mem_get_info()
    share = (total - free + gigabytes * 1e9) / total
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 4096, "mixed_prefill_tokens": 4096, "block_size": 64}
    config = EngineConfig(
        model=str(folder), load_format="dummy", device="cuda", memory_fraction=share, **(sizes | settings)
    )
    core = EngineCore(config, progress=False)
    core.hold_share()
    return core


def fill_to_the_last_block(core: EngineCore) -> tuple[int, int]:
    """(most sequences that ran at once, most blocks in use). Every prompt begins the last of its slot's blocks, and its
    answer ends there."""
    info = core.info
    share, rest = divmod(info.num_kv_blocks, info.num_state_slots)
    answer = info.block_size - 1
    for slot in range(info.num_state_slots):
        room = (share + (rest if slot == 0 else 0)) * info.block_size
        asked = {name: getattr(DEMANDING, name) for name in ("temperature", "top_p", "repetition_penalty", "logprobs")}
        prompt = [(7 * i + slot) % 32000 for i in range(room - answer)]
        core.add_request(request(f"r{slot}", prompt, max_tokens=answer, ignore_eos=True, **asked))
    running = blocks = 0
    while core.has_work:
        core.step()
        stats = core.stats()
        running, blocks = max(running, stats.num_running), max(blocks, stats.kv_blocks_used)
    return running, blocks


@pytest.mark.parametrize("backend", ["minimax", "replay"])
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
def test_memory_stays_within_the_share_when_every_slot_and_block_is_taken(folder, backend, cuda_graphs):
    core = make(folder, linear_backend=backend, cuda_graphs=cuda_graphs)
    info = core.info
    use = info.memory
    assert info.num_kv_blocks < 16 * 32768 // 64, "memory does not bound the cache: the test shows nothing"
    assert 0 <= use.unassigned < 256 * 2**20, f"memory is left idle: {use}"
    torch.cuda.reset_peak_memory_stats()
    assert fill_to_the_last_block(core) == (info.num_state_slots, info.num_kv_blocks)
    assert info.num_state_slots == 16
    assert core.stats().preemptions_total == 0
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    peak = torch.cuda.max_memory_reserved() + outside
    assert peak <= use.total, f"{peak - use.total:,} bytes beyond the share; {use}"
    core.check_integrity()


def test_every_kind_of_memory_is_measured(folder):
    use = make(folder).info.memory
    assert all(num_bytes > 0 for num_bytes in use.by_kind().values()), use
    assert use.graphs < 10**9 and use.workspace < 2 * 10**9 and use.other < 4 * 10**9, use


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("drafts", [0, 7])
def test_no_request_waits_for_a_compiler(folder, monkeypatch, backend, cuda_graphs, drafts):
    import triton

    settings = {"speculative_tokens": drafts, "speculative_max_rows": 16, "prefix_cache": not drafts}
    core = make(folder, linear_backend=backend, cuda_graphs=cuda_graphs, **settings)
    core.scheduler.speculation._propose = lambda each, count: [5] * count if can_draft(each.sampling_params) else []
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **told: compiled.append(told["repr"]))
    lengths = [1, 2, 3, 17, 63, 64, 65, 200, 1000, 3001, 4096, 9000]
    for i, length in enumerate(lengths):  # each begins beside those that decode
        asked = {"top_k": 5, "temperature": 0.7} if i % 2 else {"prompt_logprobs": 1 if i % 4 else None}
        core.add_request(request(f"r{i}", [i] * length, max_tokens=40, ignore_eos=True, **asked))
        core.step()
    for i in range(16):
        core.add_request(request(f"together{i}", [i] * (i + 1), max_tokens=3, ignore_eos=True))
    while core.has_work:
        core.step()
    assert compiled == []
    assert (core.stats().draft_tokens_total > 0) == (drafts > 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gigabytes": 0.1}, ["memory_fraction"]),
        ({"max_num_batched_tokens": 1 << 20, "max_num_seqs": 1024}, ["max_num_batched_tokens", "max_num_seqs"]),
    ],
    ids=["share", "step"],
)
def test_pool_that_does_not_fit_names_the_setting(folder, settings, words):
    torch.cuda.set_per_process_memory_fraction(8e9 / torch.cuda.mem_get_info()[1])  # a small GPU
    with pytest.raises(ConfigError) as error:
        make(folder, **settings)
    for word in words:
        assert word in str(error.value)
