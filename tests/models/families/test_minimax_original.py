"""The original spelling (MiniMax-Text-01, M1) against a recurrence written here from the formulas alone.

Nothing of Leyden is used in the reference: numpy, float64, one token after another. It covers what no class of
transformers computes: rope on a part of the channels, a residual that is not normed, a shared expert, a layer without
experts, and ALiBi's slopes for a number of heads that is no power of two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from engines import drain, make_core, request
from safetensors.torch import save_file

VOCAB, HIDDEN, LAYERS = 20, 40, 4
HEADS, KV_HEADS, DIM, ROTARY = 6, 2, 16, 8
WIDTH, THETA, EPS = 24, 5000.0, 1e-5
KINDS = [0, 1, 0, 0]
PROMPT_LENGTHS = (1, 2, 19, 70)
NUM_TOKENS = 12


@dataclass(frozen=True)
class Variant:
    architecture: str = "MiniMaxText01ForCausalLM"
    postnorm: bool = True
    experts: tuple[int, ...] = (4, 4, 4, 4)
    shared: tuple[int, ...] = (0, 0, 0, 0)
    tied: bool = False

    def config(self) -> dict:
        return {
            "architectures": [self.architecture],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": DIM,
            "rotary_dim": ROTARY,
            "rope_theta": THETA,
            "rms_norm_eps": EPS,
            "intermediate_size": WIDTH,
            "num_local_experts": list(self.experts) if len(set(self.experts)) > 1 else self.experts[0],
            "num_experts_per_tok": 2,
            "shared_intermediate_size": list(self.shared) if any(self.shared) else 0,
            "shared_moe_mode": "sigmoid",
            "attn_type_list": KINDS,
            "postnorm": self.postnorm,
            "tie_word_embeddings": self.tied,
            "layernorm_full_attention_alpha": 1.3,
            "layernorm_full_attention_beta": 0.8,
            "layernorm_linear_attention_alpha": 1.6,
            "layernorm_linear_attention_beta": 0.9,
            "layernorm_mlp_alpha": 1.2,
            "layernorm_mlp_beta": 1.1,
            "max_position_embeddings": 256,
            "eos_token_id": None,
            "hidden_act": "silu",
        }

    def tensors(self, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        found: dict[str, np.ndarray] = {}

        def matrix(name: str, rows: int, columns: int) -> None:
            found[f"{name}.weight"] = rng.normal(0, 1.4 / columns**0.5, (rows, columns))

        def norm(name: str, size: int) -> None:
            found[f"{name}.weight"] = 1 + 0.2 * rng.normal(size=size)

        found["model.embed_tokens.weight"] = rng.normal(0, 1, (VOCAB, HIDDEN))
        if not self.tied:
            matrix("lm_head", VOCAB, HIDDEN)
        norm("model.norm", HIDDEN)
        for i, kind in enumerate(KINDS):
            layer = f"model.layers.{i}"
            norm(f"{layer}.input_layernorm", HIDDEN)
            norm(f"{layer}.post_attention_layernorm", HIDDEN)
            if kind == 0:
                matrix(f"{layer}.self_attn.qkv_proj", 3 * HEADS * DIM, HIDDEN)
                matrix(f"{layer}.self_attn.output_gate", HEADS * DIM, HIDDEN)
                matrix(f"{layer}.self_attn.out_proj", HIDDEN, HEADS * DIM)
                norm(f"{layer}.self_attn.norm", HEADS * DIM)
            else:
                matrix(f"{layer}.self_attn.q_proj", HEADS * DIM, HIDDEN)
                matrix(f"{layer}.self_attn.k_proj", KV_HEADS * DIM, HIDDEN)
                matrix(f"{layer}.self_attn.v_proj", KV_HEADS * DIM, HIDDEN)
                matrix(f"{layer}.self_attn.o_proj", HIDDEN, HEADS * DIM)
            if self.experts[i] == 1:
                matrix(f"{layer}.mlp.gate_proj", WIDTH, HIDDEN)
                matrix(f"{layer}.mlp.up_proj", WIDTH, HIDDEN)
                matrix(f"{layer}.mlp.down_proj", HIDDEN, WIDTH)
            else:
                matrix(f"{layer}.block_sparse_moe.gate", self.experts[i], HIDDEN)
                for e in range(self.experts[i]):
                    matrix(f"{layer}.block_sparse_moe.experts.{e}.w1", WIDTH, HIDDEN)
                    matrix(f"{layer}.block_sparse_moe.experts.{e}.w3", WIDTH, HIDDEN)
                    matrix(f"{layer}.block_sparse_moe.experts.{e}.w2", HIDDEN, WIDTH)
            if self.shared[i]:
                matrix(f"{layer}.shared_mlp.gate_proj", self.shared[i], HIDDEN)
                matrix(f"{layer}.shared_mlp.up_proj", self.shared[i], HIDDEN)
                matrix(f"{layer}.shared_mlp.down_proj", HIDDEN, self.shared[i])
                matrix(f"{layer}.coefficient", 1, HIDDEN)
        return {name: value.astype(np.float32) for name, value in found.items()}


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean() + eps) * weight


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def gated(x, gate, up, down):
    return down @ (silu(gate @ x) * (up @ x))


# ALiBi of 6 heads: the 4 slopes of four heads, then every other of the 8 slopes of eight heads.
SLOPES = np.array([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


@dataclass
class Reference:
    """One sequence, fed token by token."""

    variant: Variant
    weights: dict[str, np.ndarray]
    states: dict[int, np.ndarray] = field(default_factory=dict)
    keys: dict[int, list] = field(default_factory=dict)
    values: dict[int, list] = field(default_factory=dict)
    position: int = 0

    def w(self, name: str) -> np.ndarray:
        return self.weights[f"{name}.weight"].astype(np.float64)

    def feed(self, token: int) -> np.ndarray:
        """Logits after `token`."""
        h = self.w("model.embed_tokens")[token]
        for i, kind in enumerate(KINDS):
            layer = f"model.layers.{i}"
            alpha, beta = (1.6, 0.9) if kind == 0 else (1.3, 0.8)
            x = rms(h, self.w(f"{layer}.input_layernorm"), EPS)
            mixed = self.lightning(x, i, layer) if kind == 0 else self.attention(x, i, layer)
            h = alpha * (x if self.variant.postnorm else h) + beta * mixed
            x = rms(h, self.w(f"{layer}.post_attention_layernorm"), EPS)
            h = 1.2 * (x if self.variant.postnorm else h) + 1.1 * self.mlp(x, i, layer)
        self.position += 1
        head = "model.embed_tokens" if self.variant.tied else "lm_head"
        return self.w(head) @ rms(h, self.w("model.norm"), EPS)

    def lightning(self, x, i, layer):
        qkv = silu(self.w(f"{layer}.self_attn.qkv_proj") @ x).reshape(HEADS, 3 * DIM)
        q, k, v = qkv[:, :DIM], qkv[:, DIM : 2 * DIM], qkv[:, 2 * DIM :]
        decay = np.exp(-SLOPES * (1 - i / (LAYERS - 1) + 1e-5))
        state = self.states.get(i, np.zeros((HEADS, DIM, DIM)))
        state = decay[:, None, None] * state + k[:, :, None] * v[:, None, :]
        self.states[i] = state
        out = np.einsum("hk,hkv->hv", q, state).reshape(-1)
        out = rms(out, self.w(f"{layer}.self_attn.norm"), 1e-6)
        return self.w(f"{layer}.self_attn.out_proj") @ (sigmoid(self.w(f"{layer}.self_attn.output_gate") @ x) * out)

    def rotate(self, x):
        """x [heads, DIM]: pairs (j, j + ROTARY / 2) of the first ROTARY channels."""
        half = ROTARY // 2
        angle = self.position * THETA ** (-2 * np.arange(half) / ROTARY)
        a, b, rest = x[:, :half], x[:, half:ROTARY], x[:, ROTARY:]
        turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest]
        return np.concatenate(turned, axis=1)

    def attention(self, x, i, layer):
        q = self.rotate((self.w(f"{layer}.self_attn.q_proj") @ x).reshape(HEADS, DIM))
        k = self.rotate((self.w(f"{layer}.self_attn.k_proj") @ x).reshape(KV_HEADS, DIM))
        self.keys.setdefault(i, []).append(k)
        self.values.setdefault(i, []).append((self.w(f"{layer}.self_attn.v_proj") @ x).reshape(KV_HEADS, DIM))
        keys, values = np.stack(self.keys[i]), np.stack(self.values[i])
        group = HEADS // KV_HEADS
        out = [softmax(keys[:, h // group] @ q[h] * DIM**-0.5) @ values[:, h // group] for h in range(HEADS)]
        return self.w(f"{layer}.self_attn.o_proj") @ np.concatenate(out)

    def mlp(self, x, i, layer):
        if self.variant.experts[i] == 1:
            names = (f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down"))
            return gated(x, *(self.w(name) for name in names))
        moe = f"{layer}.block_sparse_moe"
        p = softmax(self.w(f"{moe}.gate") @ x)
        best = np.argsort(-p)[:2]
        y = sum(
            p[e] / p[best].sum() * gated(x, *(self.w(f"{moe}.experts.{e}.{part}") for part in ("w1", "w3", "w2")))
            for e in best
        )
        if self.variant.shared[i]:
            c = sigmoid(self.w(f"{layer}.coefficient") @ x)
            shared = gated(x, *(self.w(f"{layer}.shared_mlp.{part}_proj") for part in ("gate", "up", "down")))
            y = (1 - c) * y + c * shared
        return y


VARIANTS = {
    "text-01": Variant(),
    "m1, residual not normed": Variant("MiniMaxM1ForCausalLM", postnorm=False),
    "shared expert": Variant(shared=(12, 12, 12, 12)),
    "mixed layers": Variant(postnorm=False, experts=(1, 4, 3, 1), shared=(0, 16, 0, 0)),
    "no experts, tied": Variant(experts=(1, 1, 1, 1), tied=True),
}


def log_softmax(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def oracle(request, tmp_path_factory):
    """(folder, {prompt length: (prompt, greedy answer, log-probabilities after every token)})."""
    variant = request.param
    folder = tmp_path_factory.mktemp("original")
    weights = variant.tensors(seed=5)
    (folder / "config.json").write_text(json.dumps(variant.config()))
    save_file({name: torch.from_numpy(value) for name, value in weights.items()}, folder / "model.safetensors")
    expected = {}
    for length in PROMPT_LENGTHS:
        reference = Reference(variant, weights)
        prompt = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
        tokens, table = list(prompt), []
        while len(table) < length + NUM_TOKENS - 1:
            table.append(log_softmax(reference.feed(tokens[len(table)])))
            if len(table) >= length:
                second, best = np.sort(table[-1])[-2:]
                assert best - second > 2e-4, "a tie proves nothing; take another seed"
                tokens.append(int(table[-1].argmax()))
        expected[length] = (prompt, tokens[length:], np.stack(table))
    return folder, expected


@pytest.mark.parametrize("backend", ["minimax", "seg_la"])
@pytest.mark.parametrize("budget", [256, 11])
def test_whole_distributions_and_greedy_tokens_equal_the_recurrence(oracle, backend, budget):
    """With a small budget prompts are chunked and mixed with decode rows; all sequences run at once."""
    folder, expected = oracle
    core = make_core(folder, linear_backend=backend, max_num_batched_tokens=budget)
    everything = {"logprobs": VOCAB, "prompt_logprobs": VOCAB, "max_tokens": NUM_TOKENS}
    answers = drain(core, *(request(str(n), prompt, **everything) for n, (prompt, _, _) in expected.items()))
    for length, (_, tokens, table) in expected.items():
        got = answers[str(length)]
        assert got.token_ids == tokens, f"prompt of {length}"
        entries = [*got.prompt_logprobs[1:], *got.logprobs]
        assert len(entries) == len(table)
        for position, (entry, row) in enumerate(zip(entries, table, strict=True)):
            measured = np.array([value for _, value in sorted(entry.top)])
            assert np.abs(measured - row).max() < 2e-4, f"prompt of {length}, position {position}"
