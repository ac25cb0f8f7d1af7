"""Ring-linear-2.0 from its formulas alone: tiny random checkpoints in the released spelling, and their greedy answers.

Nothing of Leyden is used here: plain torch, float64, one token after another, one state or one list of keys per layer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import full_tokenizer
from torch import Tensor

VOCAB = 320  # the 256 bytes and some control tokens
END, ROLE_END = 256, 257
CONTROL = ("<|endoftext|>", "<|role_end|>", "<role>", "</role>", "<think>", "</think>", "<tool_call>", "</tool_call>")

# All fields of Ring-mini-linear-2.0's config.json, with small sizes.
TINY: dict[str, Any] = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bailing_moe_linear_v2.BailingMoeLinearV2Config"},
    "embedding_dropout": 0.0,
    "eos_token_id": END,
    "first_k_dense_replace": 1,
    "group_norm_size": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 40,
    "layer_group_size": 3,
    "linear_silu": False,
    "max_position_embeddings": 1024,
    "model_type": "bailing_moe_linear",
    "moe_intermediate_size": 24,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 24,
    "n_group": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "pad_token_id": END,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.56.1",
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": VOCAB,
}

CHAT_TEMPLATE = """
{%- if tools or messages[0].role == 'system' %}<role>SYSTEM</role>
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{{ '\\n' }}{% endif %}
{%- if tools %}For each function call, return a json object with function name and arguments within XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{% endif %}detailed thinking on<|role_end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}<role>HUMAN</role>{{ m.content }}<|role_end|>
{%- elif m.role == 'tool' %}<role>OBSERVATION</role>{{ m.content }}<|role_end|>
{%- elif m.role == 'assistant' %}<role>ASSISTANT</role>{{ (m.content or '').split('</think>')[-1] }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|role_end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"""


def is_softmax(config: dict[str, Any], i: int) -> bool:
    """The last layer of each whole group, and all layers that make no whole group."""
    size, num_layers = config["layer_group_size"], config["num_hidden_layers"]
    return (i + 1) % size == 0 or i >= num_layers // size * size


def make_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights by their released names, float32; wide enough that a greedy answer wanders."""
    generator = torch.Generator().manual_seed(seed)
    d, H, H_kv, D = (config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    tensors: dict[str, Tensor] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.2) -> None:
        tensors[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)

    def gated(name: str, width: int) -> None:
        matrix(f"{name}.gate_proj", width, d)
        matrix(f"{name}.up_proj", width, d)
        matrix(f"{name}.down_proj", d, width)

    tensors["model.word_embeddings.weight"] = torch.randn(config["vocab_size"], d, generator=generator)
    norm("model.norm", d)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.attention", f"model.layers.{i}.mlp"
        norm(f"model.layers.{i}.input_layernorm", d)
        norm(f"model.layers.{i}.post_attention_layernorm", d)
        matrix(f"{attention}.query_key_value", (H + 2 * H_kv) * D if is_softmax(config, i) else 3 * H * D, d)
        if config["use_qk_norm"]:
            norm(f"{attention}.query_layernorm", D)
            norm(f"{attention}.key_layernorm", D)
        if not is_softmax(config, i):
            matrix(f"{attention}.g_proj", H * D, d)
            norm(f"{attention}.g_norm", H * D)
        matrix(f"{attention}.dense", d, H * D)
        if i < config["first_k_dense_replace"]:
            gated(mlp, config["intermediate_size"])
            continue
        matrix(f"{mlp}.gate", config["num_experts"], d)
        if config["moe_router_enable_expert_bias"]:
            tensors[f"{mlp}.gate.expert_bias"] = 0.2 * torch.randn(config["num_experts"], generator=generator)
        for e in range(config["num_experts"]):
            gated(f"{mlp}.experts.{e}", config["moe_intermediate_size"])
        if config["num_shared_experts"]:
            gated(f"{mlp}.shared_experts", config["moe_shared_expert_intermediate_size"] * config["num_shared_experts"])
    return tensors


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A checkpoint in `folder`: weights, config.json, generation_config.json, a byte-level tokenizer with a chat
    template."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, ROLE_END], "pad_token_id": END}))
    save_file(tensors, folder / "model.safetensors")
    tokenizer = full_tokenizer(CONTROL)
    assert tokenizer.convert_tokens_to_ids(list(CONTROL[:2])) == [END, ROLE_END]
    tokenizer.eos_token = CONTROL[1]
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def slopes(num_heads: int) -> Tensor:
    """ALiBi's, as two geometric lists when the number of heads is no power of two."""
    if math.log2(num_heads).is_integer():
        return torch.tensor([2.0 ** (-8.0 * (h + 1) / num_heads) for h in range(num_heads)], dtype=torch.float64)
    power = 2 ** math.floor(math.log2(num_heads))
    return torch.cat([slopes(power), slopes(2 * power)[::2][: num_heads - power]])


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


@dataclass
class Sequence:
    """The state, or the keys and values, of one sequence in each layer."""

    position: int = 0
    states: dict[int, Tensor] = field(default_factory=dict)  # [H, K, V]
    keys: dict[int, Tensor] = field(default_factory=dict)  # [H_kv, T, D]
    values: dict[int, Tensor] = field(default_factory=dict)


class Reference:
    """The model, fed one token at a time.

    `closest` is the smallest difference so far between an expert or group that was chosen and the next best one.
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in tensors.items()}
        self.eps = config["rms_norm_eps"]
        self.closest = math.inf

    def w(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"]

    def feed(self, sequence: Sequence, token: int) -> Tensor:
        """Logits [V] after `token`, which is appended to the sequence."""
        h = self.w("model.word_embeddings")[token]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = rms(h, self.w(f"{layer}.input_layernorm"), self.eps)
            mixer = self.softmax if is_softmax(self.config, i) else self.lightning
            h = h + mixer(x, i, sequence)
            x = rms(h, self.w(f"{layer}.post_attention_layernorm"), self.eps)
            if i < self.config["first_k_dense_replace"]:
                h = h + self.gated(x, f"{layer}.mlp")
            else:
                h = h + self.experts(x, f"{layer}.mlp")
        sequence.position += 1
        head = "model.word_embeddings" if self.config["tie_word_embeddings"] else "lm_head"
        return self.w(head) @ rms(h, self.w("model.norm"), self.eps)

    def heads(self, x: Tensor, i: int, num_kv_heads: int, position: int) -> list[Tensor]:
        """Queries [H, D], keys and values [H_kv, D]: all queries first, then all keys, then all values."""
        attention = f"model.layers.{i}.attention"
        H, D = self.config["num_attention_heads"], self.config["head_dim"]
        qkv = (self.w(f"{attention}.query_key_value") @ x).view(H + 2 * num_kv_heads, D)
        q, k, v = qkv.split([H, num_kv_heads, num_kv_heads])
        if self.config["use_qk_norm"]:
            q = rms(q, self.w(f"{attention}.query_layernorm"), self.eps)
            k = rms(k, self.w(f"{attention}.key_layernorm"), self.eps)
        return [self.rotate(q, position), self.rotate(k, position), v]

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """x [heads, D]: pairs (j, j + R/2) of the first R channels."""
        R = int(self.config["head_dim"] * self.config["partial_rotary_factor"])
        angles = position * self.config["rope_theta"] ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        a, b, rest = x.split([R // 2, R // 2, x.shape[1] - R], dim=1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=1)

    def lightning(self, x: Tensor, i: int, sequence: Sequence) -> Tensor:
        attention = f"model.layers.{i}.attention"
        H, D, num_layers = (self.config[name] for name in ("num_attention_heads", "head_dim", "num_hidden_layers"))
        q, k, v = self.heads(x, i, H, sequence.position)
        offset = self.config.get("slope_layer_offset", 0)
        decay = (-slopes(H) * (1 - (i - offset) / (num_layers - 1) + 1e-5)).exp()
        state = sequence.states.get(i, torch.zeros(H, D, D, dtype=torch.float64))
        state = decay[:, None, None] * state + k[:, :, None] * v[:, None, :]
        sequence.states[i] = state
        o = (q[:, None, :] @ state)[:, 0] * D**-0.5  # [H, 1, K] @ [H, K, V]
        groups = o.reshape(self.config["group_norm_size"], -1)
        normed = rms(groups, torch.ones(()), self.eps).flatten() * self.w(f"{attention}.g_norm")
        gate = 1 / (1 + (-(self.w(f"{attention}.g_proj") @ x)).exp())
        return self.w(f"{attention}.dense") @ (normed * gate)

    def softmax(self, x: Tensor, i: int, sequence: Sequence) -> Tensor:
        H, H_kv, D = (self.config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        q, k, v = self.heads(x, i, H_kv, sequence.position)
        empty = torch.empty(H_kv, 0, D, dtype=torch.float64)
        sequence.keys[i] = torch.cat([sequence.keys.get(i, empty), k[:, None]], dim=1)
        sequence.values[i] = torch.cat([sequence.values.get(i, empty), v[:, None]], dim=1)
        out = []
        for h in range(H):
            keys, values = sequence.keys[i][h * H_kv // H], sequence.values[i][h * H_kv // H]
            out.append((keys @ q[h] * D**-0.5).softmax(0) @ values)
        return self.w(f"model.layers.{i}.attention.dense") @ torch.cat(out)

    def gated(self, x: Tensor, name: str) -> Tensor:
        up = silu(self.w(f"{name}.gate_proj") @ x) * (self.w(f"{name}.up_proj") @ x)
        return self.w(f"{name}.down_proj") @ up

    def experts(self, x: Tensor, mlp: str) -> Tensor:
        scores = 1 / (1 + (-(self.w(f"{mlp}.gate") @ x)).exp())
        chosen = self.choose(scores + self.weights.get(f"{mlp}.gate.expert_bias", 0))
        total = sum(float(scores[e]) for e in chosen) if self.config["norm_topk_prob"] else 1.0
        y = torch.zeros_like(x)
        for e in chosen:
            weight = float(scores[e]) / total * self.config["routed_scaling_factor"]
            y = y + weight * self.gated(x, f"{mlp}.experts.{e}")
        return y + self.gated(x, f"{mlp}.shared_experts") if self.config["num_shared_experts"] else y

    def choose(self, scores: Tensor) -> list[int]:
        """The best experts of the best groups; a group is as good as the sum of its two best."""
        num_groups, num_kept = self.config["n_group"], self.config["topk_group"]
        size = len(scores) // num_groups
        groups = [scores[g * size : (g + 1) * size].sort(descending=True).values[:2].sum() for g in range(num_groups)]
        kept = self.best([float(score) for score in groups], num_kept)
        allowed = [g * size + j for g in kept for j in range(size)]
        best = self.best([float(scores[e]) for e in allowed], self.config["num_experts_per_tok"])
        return [allowed[j] for j in best]

    def best(self, scores: list[float], count: int) -> list[int]:
        order = sorted(range(len(scores)), key=lambda j: -scores[j])
        if count < len(scores):
            self.closest = min(self.closest, scores[order[count - 1]] - scores[order[count]])
        return order[:count]

    def logits(self, tokens: list[int]) -> Tensor:
        """[T, V], after each token."""
        sequence = Sequence()
        return torch.stack([self.feed(sequence, token) for token in tokens])

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The greedy continuation. Fails where a rounding of float32 could change a token or an expert."""
        sequence, tokens = Sequence(), list(prompt)
        for position in range(len(prompt) + num_tokens - 1):
            logits = self.feed(sequence, tokens[position])
            if position >= len(prompt) - 1:
                best, second = logits.topk(2).values.tolist()
                assert best - second > 1e-3, "a tie proves nothing; take another seed"
                tokens.append(int(logits.argmax()))
        assert self.closest > 2e-6, "two experts are nearly equal; take another seed"
        return tokens[len(prompt) :]
