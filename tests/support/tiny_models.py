"""Tiny random checkpoints, saved by transformers itself, and its own greedy answers to compare with."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import MiniMaxConfig, MiniMaxForCausalLM, PreTrainedTokenizerFast

VOCAB = 320  # the 256 bytes and some control tokens
LINEAR, FULL = "linear_attention", "full_attention"
LINEAR_FIRST = (LINEAR, LINEAR, FULL, LINEAR)
FULL_FIRST = (FULL, LINEAR, LINEAR, FULL)

CONTROL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_minimax(
    folder: Path, *, heads: int = 4, layer_types: tuple[str, ...] = LINEAR_FIRST, seed: int = 0
) -> MiniMaxForCausalLM:
    """A random model whose greedy text wanders, written to `folder` with a byte-level tokenizer."""
    torch.manual_seed(seed)
    config = MiniMaxConfig(
        vocab_size=VOCAB,
        hidden_size=16 * heads,
        num_hidden_layers=len(layer_types),
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=32,
        rms_norm_eps=1e-5,
        layer_types=list(layer_types),
        full_attn_alpha_factor=1.5,
        linear_attn_alpha_factor=1.25,
        mlp_alpha_factor=1.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = MiniMaxForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.requires_grad_(False)
        assert parameter.isfinite().all(), name
    model.save_pretrained(folder)
    full_tokenizer().save_pretrained(folder)
    return model


def byte_tokenizer(control: tuple[str, ...] = CONTROL) -> PreTrainedTokenizerFast:
    """One token per byte, and control tokens for a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": list(control)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def full_tokenizer(control: tuple[str, ...] = CONTROL) -> PreTrainedTokenizerFast:
    """`byte_tokenizer` with a token for every logit of a tiny model, so that its random text may have them all."""
    return byte_tokenizer((*control, *(f"<|{i}|>" for i in range(256 + len(control), VOCAB))))


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: words carry their blank in front, a text's first blank is its own, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Helowrd", "▁w", "▁wo"]
    merges = [("▁", "w"), ("▁w", "o")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    return tokenizer


def greedy(model: MiniMaxForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' greedy continuation, recomputed from scratch for every token."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        use_cache=False,
    )
    return output[0, len(prompt) :].tolist()


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()
