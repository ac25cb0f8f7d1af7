"""The training script on a handful of rows, its dense forms against the originals, and the model that is shipped."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MiniMaxForCausalLM

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, DEMO = ROOT / "tools" / "train_demo.py", ROOT / "models" / "demo"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, dict[str, Any]]:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, output_loading_info=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def test_three_steps_of_training_leave_a_model_that_transformers_loads(tmp_path: Path) -> None:
    options = {
        "out": tmp_path,
        "steps": 3,
        "batch-tokens": 128,
        "seq-len": 64,
        "limit": 40,
        "log-every": 3,
        "warmup": 1,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # more threads only wait for each other at this size
    subprocess.run([sys.executable, SCRIPT, "train", *arguments], check=True, cwd=tmp_path, env=one_thread)
    (point,) = json.loads((tmp_path / "training.json").read_text())["curve"]
    assert math.isfinite(point["train"]) and point["held_out"] < math.log(4096) + 1
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == AutoTokenizer.from_pretrained(DEMO).chat_template
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_dense_training_forms_compute_what_the_transformers_forward_computes(script: ModuleType) -> None:
    config = script.model_config(vocab_size=64)
    config.initializer_range = 0.1  # attention and routing far from uniform
    torch.manual_seed(0)
    model = MiniMaxForCausalLM(config).eval()
    ids = torch.randint(7, 64, (2, 192))
    with torch.no_grad():
        original = model(ids, use_cache=False).logits
        router_logits = script.prepare_for_training(model)
        dense = model(ids, use_cache=False).logits
    assert len(router_logits) == config.num_hidden_layers
    assert (dense - original).norm() < 1e-4 * original.norm()


def test_only_what_the_model_says_weighs_fully(script: ModuleType, tokenizer: Any) -> None:
    rows = [{"kind": "talk", "user": "Hello there", "assistant": "Hi! How are you?"}]
    ids, weights = script.build_stream(DEMO, rows, seed=3, planned=0.0)
    said = tokenizer.decode([i for i, weight in zip(ids.tolist(), weights, strict=True) if weight == 1])
    assert said == "Hi! How are you?<|end|>"


def test_another_name_replaces_the_old_one_everywhere(script: ModuleType) -> None:
    row = {"kind": "story", "user": "Tell a story about a fox named Lily.", "assistant": "Lily ran. She was Lily."}
    varied = [script.vary(row, random.Random(seed)) for seed in range(50)]
    renamed = [text for _, text in varied if "Lily" not in text]
    assert renamed and all(text.split()[0] + "." == text.split()[-1] for text in renamed)


def test_shipped_model_loads_with_no_key_missing_or_left_over(loaded: tuple[Any, dict[str, Any]]) -> None:
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shipped_decay_buffers_are_exact_in_float32(loaded: tuple[Any, dict[str, Any]]) -> None:
    for layer in loaded[0].model.layers:
        if layer.block_type == "linear_attention":
            torch.testing.assert_close(layer.self_attn.slope_rate, layer.self_attn.get_slope_rate(), rtol=0, atol=0)


def test_shipped_files_stay_under_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 25_000_000


def test_turn_tokens_are_special_and_skipped(script: ModuleType, tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(script.SPECIAL) == list(range(len(script.SPECIAL)))
    ids = tokenizer("<|user|>Hello<|end|>")["input_ids"]
    assert ids[0] == script.START and ids[1] == script.USER and ids[-1] == script.END
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello"


def test_any_unicode_text_survives_the_tokenizer(tokenizer: Any) -> None:
    text = "naïve 日本語 🦊\n\t  two  spaces 12345 \u0000\u200d end "
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_chat_template_renders_every_role_and_text_parts(tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi!"},
        {"role": "tool", "content": "12"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|startoftext|><|system|>Be kind.<|end|><|user|>Hello<|end|>"
        "<|assistant|>Hi!<|end|><|user|>12<|end|><|assistant|>"
    )


def test_chat_template_refuses_unknown_roles(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="unknown role: narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "Once"}], tokenize=False)


@pytest.mark.parametrize("request_text", ["Tell me a short story about a brave little fox.", "Hello!"])
def test_greedy_answer_ends_its_turn(
    loaded: tuple[Any, dict[str, Any]], tokenizer: Any, script: ModuleType, request_text: str
) -> None:
    message = [{"role": "user", "content": request_text}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = loaded[0].generate(ids, max_new_tokens=400, do_sample=False)[0]
    assert out[-1] == script.END
    assert len(tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)) > 10


def test_planned_stories_take_the_place_of_stories_alone(script: ModuleType) -> None:
    rows = [{"kind": kind, "user": "a", "assistant": "b"} for kind in ("story", "explain", "talk") for _ in range(40)]
    kinds = [row["kind"] for row in script.plan_rows(rows, 1.0, seed=1)]
    assert [kinds.count(kind) for kind in ("story", "planned", "explain", "talk")] == [0, 40, 40, 40]
    assert script.plan_rows(rows, 0.0, seed=1) == rows
