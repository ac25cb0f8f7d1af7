"""What a request may say about the prefix cache, and what its answer tells of it."""

from __future__ import annotations

import json

import pytest
from leyden.configs.schema import EngineConfig, ServerConfig
from leyden.engine.async_llm import AsyncLLM
from leyden.engine.boundary.in_process import InProcessClient
from leyden.engine.text.tokenizer import Tokenizer
from leyden.models.loading.checkpoint import resolve
from leyden.server.http.app import create_app
from openai.types.responses import Response

ROUTES = {
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/responses": lambda text: {"input": text},
}
INCLUDE_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CONTINUOUS = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.fixture(params=ROUTES)
def ask(request, client):
    """ask(**body) -> response, on every route that generates."""

    async def post(text="Hi", **body):
        return await client.post(request.param, json=ROUTES[request.param](text) | body)

    return post


# -- what is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({}, (True, None)),
        ({"cache_salt": None, "prefix_cache": None}, (True, None)),
        ({"cache_salt": "ä" * 256}, (True, "ä" * 256)),
        ({"prefix_cache": False}, (False, None)),
        ({"prefix_cache": False, "cache_salt": "a"}, (False, "a")),
        ({"prompt_cache_key": "a"}, (True, None)),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
async def test_cache_settings_of_a_request_reach_the_engine(ask, engine, body, asked):
    response = await ask(**body)
    assert response.status_code == 200 and "x-ignored-parameters" not in response.headers
    assert [(request.prefix_cache, request.cache_salt) for request in engine.requests] == [asked]


async def test_every_choice_of_every_prompt_has_the_salt(complete, engine):
    await complete(prompt=["a", "b"], n=2, cache_salt="s")
    assert [request.cache_salt for request in engine.requests] == ["s"] * 4


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("cache_salt", "", "at least 1 character"),
        ("cache_salt", "x" * 257, "at most 256 characters"),
        ("cache_salt", 5, "got 5"),
        ("prefix_cache", 1, "got 1"),
        ("prefix_cache", "false", 'got "false"'),
    ],
)
async def test_wrong_cache_setting_is_refused_by_name(ask, engine, error_of, field, value, words):
    error = error_of(await ask(**{field: value}), 400)
    assert error["param"] == field and words in error["message"]
    assert engine.requests == []


# -- what is told -------------------------------------------------------------------------------------------------


def cached(usage):
    (details,) = [value for name, value in usage.items() if name in ("prompt_tokens_details", "input_tokens_details")]
    return details["cached_tokens"]


async def test_nothing_cached_is_told_as_0(ask):
    assert cached((await ask()).json()["usage"]) == 0


@pytest.fixture
def found(engine):
    """By choice, what the engine finds cached of its prompt: the second of each prompt copies from the first."""
    counts = {0: 1, 1: 0, 2: 2, 3: 0}
    engine.count_cached = lambda request: counts[int(request.request_id.rpartition("-")[2])]


@pytest.mark.usefixtures("found")
async def test_each_prompt_counts_once_whatever_continues_it(complete, chat, chunks_of):
    whole = (await complete(prompt=["a", "bc"], n=2)).json()["usage"]
    assert (whole["prompt_tokens"], cached(whole)) == (5, 3)
    assert chunks_of(await complete(prompt=["a", "bc"], n=2, **INCLUDE_USAGE))[-1]["usage"] == whole
    whole = (await chat(n=2)).json()["usage"]
    assert cached(whole) == 1
    assert chunks_of(await chat(n=2, **INCLUDE_USAGE))[-1]["usage"] == whole


@pytest.mark.usefixtures("found")
async def test_a_chunk_tells_of_the_prompt_that_it_continues(complete, chat, chunks_of):
    *chunks, last = chunks_of(await complete(prompt=["a", "bc"], n=2, **CONTINUOUS))
    told = {(chunk["choices"][0]["index"] // 2, cached(chunk["usage"])) for chunk in chunks}
    assert told == {(0, 1), (1, 2)} and cached(last["usage"]) == 3
    assert {cached(chunk["usage"]) for chunk in chunks_of(await chat(n=2, **CONTINUOUS))} == {1}


async def test_a_response_tells_of_its_input(client, engine):
    engine.count_cached = lambda request: 4
    whole = (await client.post("/v1/responses", json={"input": "Hi"})).json()
    Response.model_validate(whole, strict=True)
    assert cached(whole["usage"]) == 4
    streamed = await client.post("/v1/responses", json={"input": "Hi", "stream": True})
    last = json.loads(streamed.text.split("\n\n")[-2].split("\n")[1].removeprefix("data: "))
    assert last["response"]["usage"] == whole["usage"]


# -- the embedded model -------------------------------------------------------------------------------------------

LONG = "Once there was a fox who lived in a wood. " * 20


@pytest.fixture
async def served(make_client):
    """A client of the embedded model, in this process."""
    config = EngineConfig(model="demo", device="cpu", max_num_seqs=8, cpu_memory_gb=0.2, num_threads=1)
    engine = InProcessClient(config)
    await engine.start()
    llm = AsyncLLM(engine, Tokenizer(resolve("demo")))
    yield make_client(create_app(llm, ServerConfig(), model_name="demo"))
    await engine.close()


async def test_the_same_prompt_again_is_computed_from_its_last_token_on(served, chunks_of):
    async def usage(path, text=LONG, **body):
        bound = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        body = ROUTES[path](text) | {"temperature": 0, bound: 4} | body
        response = await served.post(path, json=body)
        assert response.status_code == 200, response.text
        return chunks_of(response)[-1]["usage"] if body.get("stream") else response.json()["usage"]

    for path in ROUTES:
        salt = {"cache_salt": path}  # each route finds what it left itself
        assert cached(await usage(path, **salt)) == 0
        again = await usage(path, **salt)
        num_prompt = again.get("prompt_tokens", again.get("input_tokens"))
        assert num_prompt > EngineConfig().snapshot_min_tokens
        assert cached(again) == num_prompt - 1
    whole = await usage("/v1/completions", cache_salt="/v1/completions")
    assert await usage("/v1/completions", cache_salt="/v1/completions", **INCLUDE_USAGE) == whole
    both = await usage("/v1/completions", [LONG, LONG + "It sang."], n=2, cache_salt="/v1/completions")
    assert cached(both) == 2 * cached(whole), "what is found of each prompt, once"
    load = (await served.get("/load")).json()
    assert 0 < load["snapshots_used"] < load["snapshots_total"] and load["kv_blocks_cached"] > 0


async def test_salts_do_not_share_and_prefix_cache_false_neither_takes_nor_leaves(served):
    async def num_cached(**body):
        body = {"prompt": LONG, "max_tokens": 4, "temperature": 0} | body
        return cached((await served.post("/v1/completions", json=body)).json()["usage"])

    opted_out = {"prefix_cache": False}
    assert [await num_cached(**opted_out), await num_cached(**opted_out), await num_cached()] == [0, 0, 0]
    all_but_last = await num_cached()
    assert all_but_last > 0 and await num_cached(**opted_out) == 0
    salted = [await num_cached(cache_salt=salt) for salt in ("a", "a", "b")]
    assert salted == [0, all_but_last, 0]
    assert await num_cached(echo=True, logprobs=0) == 0, "a prompt that is scored is computed whole"
