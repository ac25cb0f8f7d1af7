"""Give a configuration in `benchmarks/configs` a tokenizer, so that random weights can be served over HTTP too.

    python -P benchmarks/make_tokenizer.py benchmarks/configs/dense /tmp/dense
    leyden serve /tmp/dense --load-format dummy

The tokenizer is a byte-level BPE trained on the demo's corpus, filled up to the configuration's vocabulary with words
that do not occur, since every id may be drawn.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = Path(__file__).resolve().parent.parent / "tools" / "demo_corpus" / "heldout.jsonl.xz"


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Exactly `vocab_size` entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        bpe.train_from_iterator((json.loads(line)["assistant"] for line in file), trainer)
    bpe.add_tokens([f"word{i}" for i in range(vocab_size - bpe.get_vocab_size())])
    return bpe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="folder with a config.json")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    vocab_size = json.loads((arguments.config / "config.json").read_text())["vocab_size"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(arguments.config / "config.json", arguments.out)
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(vocab_size)).save_pretrained(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
