"""Several choices of one prompt, on every route: none of them waits for one that does not come."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from leyden.configs.schema import EngineConfig, ServerConfig
from leyden.engine.async_llm import AsyncLLM
from leyden.engine.boundary.in_process import InProcessClient
from leyden.engine.scheduling import siblings
from leyden.engine.text.tokenizer import Tokenizer
from leyden.models.loading.checkpoint import resolve
from leyden.server.http.app import create_app

GUARD_SECONDS = 30
COMMON = [
    {},
    {"stream": True},
    {"seed": 1, "temperature": 1.0},
    {"stop": ["e"]},
    {"structured_outputs": {"regex": "[a-z]"}},
]
COMPLETIONS = [
    {"prompt": prompt, "max_tokens": max_tokens} | scores | more
    for prompt, max_tokens, scores, more in itertools.product(
        [[65], ["Once upon", "a time"]],
        [0, 3],
        [{}, {"echo": True}, {"logprobs": 1}, {"echo": True, "logprobs": 1}],
        COMMON[::2],
    )
    if max_tokens or "echo" in scores
]
MESSAGE = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 3}
CHATS = [MESSAGE | scores | more for scores in ({}, {"logprobs": True, "top_logprobs": 2}) for more in COMMON]


@pytest.fixture
async def served(make_client, monkeypatch):
    """A client of the embedded model, in this process, which waits for an announced sibling for ever."""
    monkeypatch.setattr(siblings, "PATIENCE", 10**12)
    engine = InProcessClient(EngineConfig(model="demo", device="cpu", max_num_seqs=8, cpu_memory_gb=0.2, num_threads=1))
    await engine.start()
    llm = AsyncLLM(engine, Tokenizer(resolve("demo")))
    yield make_client(create_app(llm, ServerConfig(), model_name="demo"))
    await engine.close()


@pytest.mark.parametrize(
    ("route", "bodies"),
    [
        ("completions", COMPLETIONS),
        ("chat/completions", CHATS),
        ("responses", [{"input": "Hi", "max_output_tokens": 3}]),
    ],
    ids=["completions", "chat", "responses"],
)
async def test_no_request_waits_for_choices_that_do_not_come(served, route, bodies):
    several = {} if route == "responses" else {"n": 3}
    for body in bodies:
        async with asyncio.timeout(GUARD_SECONDS):
            response = await served.post(f"/v1/{route}", json=body | several)
        assert response.status_code == 200, (body, response.text)
