"""One tiny checkpoint for every test of the engine."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engines import DEVICE
from leyden.engine.execution import graphs as cuda_graph
from leyden.engine.text.tokenizer import Tokenizer
from tiny_models import save_minimax, sentencepiece_tokenizer


@dataclass
class Tiny:
    """A folder, and transformers' own model of it."""

    folder: Path
    model: torch.nn.Module

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """log_softmax of transformers' logits after each token: [len(ids), vocab]."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits.float().log_softmax(dim=-1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    return Tiny(folder, save_minimax(folder, layer_types=("linear_attention", "full_attention")))


@pytest.fixture(scope="session")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer(tiny.folder)


@pytest.fixture(scope="session")
def sentencepiece(tiny, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(tiny.folder / "config.json", folder)
    sentencepiece_tokenizer().save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture
def played_graphs(monkeypatch):
    """Where there is no GPU a graph is played by running its step again over the same static tensors."""

    def record(function, pool, device):
        results = function()

        def replay() -> None:
            for result, now in zip(results, function(), strict=True):
                result.copy_(now)

        return torch.inference_mode()(replay), results

    if DEVICE == "cpu":
        monkeypatch.setattr(cuda_graph, "record", record)
