"""A model may have more logits than its tokenizer tokens (Qwen3.5: 248,320 and 248,077). The rest is never drawn."""

from __future__ import annotations

import pytest
from leyden.engine.errors import CheckpointError
from leyden.engine.llm import LLM
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.text.grammar import regex_grammar
from leyden.engine.text.tokenizer_files import ids_without_token
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, byte_tokenizer, save_minimax

NUM_TOKENS = len(byte_tokenizer())
LONG = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that would draw nothing but ids without a token."""
    path = tmp_path_factory.mktemp("padded")
    save_minimax(path)
    byte_tokenizer().save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][NUM_TOKENS:] *= 50
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module", params=[0, 7], ids=["plain", "drafts"])
def llm(folder, request):
    options = {"max_num_seqs": 2, "cpu_memory_gb": 0.05, "num_threads": 1, "speculative_tokens": request.param}
    return LLM(str(folder), device="cpu", **options)


MODES = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 1},
    "sampled from few": {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 1},
    "a bias": {"logit_bias": {VOCAB - 1: 100.0, NUM_TOKENS: 100.0}},
    "penalties": {"repetition_penalty": 2.0, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    "stop ids put off": {"min_tokens": LONG, "stop_token_ids": (VOCAB - 1, 65)},
    "scores": {"logprobs": 20, "prompt_logprobs": 20},
    "a grammar": {"grammar": regex_grammar("[a-z]{1,100}")},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_no_id_without_a_token_is_drawn(llm, mode):
    if "grammar" in mode:
        pytest.importorskip("llguidance")
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": LONG} | mode)
    prompt = [65, 66, VOCAB - 1, VOCAB - 2] * 5  # a client may send such ids, and drafts repeat them
    for answer in llm.generate([prompt, [1, 2, 3]], params):
        assert answer.token_ids and max(answer.token_ids) < NUM_TOKENS
        for entry in [*(answer.logprobs or []), *(answer.prompt_logprobs or [])]:
            if entry is not None:
                assert all(token_id < NUM_TOKENS or logprob == float("-inf") for token_id, logprob in entry.top)
                assert max(token_id for token_id, _ in entry.top[:20]) < NUM_TOKENS


def test_ids_without_a_token_are_told_by_the_tokenizers_file(tmp_path):
    assert ids_without_token(tmp_path, 10) == []
    byte_tokenizer().save_pretrained(tmp_path)
    assert ids_without_token(tmp_path, VOCAB) == list(range(NUM_TOKENS, VOCAB))
    assert ids_without_token(tmp_path, 100) == []
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": [["a", 0], ["b", 0]]}, "added_tokens": [{"id": 4}]}')
    assert ids_without_token(tmp_path, 6) == [2, 3, 5]
    for broken in ('{"model": {}}', '{"model": {"vocab": null}}', '{"model": {"vocab": {}}, "added_tokens": [1]}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json has no vocabulary"):
            ids_without_token(tmp_path, 6)
