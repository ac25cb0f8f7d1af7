"""Tokens as log-probabilities show them: text, and bytes where a token is part of a character."""

from __future__ import annotations

import shutil

import pytest
from leyden.engine.outputs import TokenLogprobs
from leyden.engine.text.tokenizer import Tokenizer
from leyden.models.loading.checkpoint import DEMO_FOLDER
from leyden.server.answers.logprobs import CompletionLogprobsWriter, chat_logprobs
from leyden.server.wire.token_names import TokenNames
from tiny_models import sentencepiece_tokenizer


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(DEMO_FOLDER / "config.json", folder)
    sentencepiece_tokenizer().save_pretrained(folder)
    return Tokenizer(folder)


def test_tokens_of_byte_fallback_are_their_bytes_and_blanks_are_kept(sentencepiece):
    text = "Hello world\né"
    first, *ids = sentencepiece.encode(text, add_special_tokens=False)
    entries = [TokenLogprobs.of(token_id, -1.0, []) for token_id in ids]
    shown = CompletionLogprobsWriter(TokenNames(sentencepiece)).write([None, *entries], first)
    assert shown.tokens == ["", *"Hello", " wo", *"rld\n", "bytes:\\xc3", "bytes:\\xa9"]
    assert "".join(shown.tokens[:-2]) == text[:-1], "of a text's first token the decoder drops the blank"
    assert shown.text_offset == [len("".join(shown.tokens[:i])) for i in range(len(shown.tokens))]
    told = chat_logprobs(entries, 0, TokenNames(sentencepiece)).content
    assert bytes(byte for entry in told for byte in entry.bytes).decode() == text
