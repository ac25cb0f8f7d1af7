from __future__ import annotations

import asyncio
import threading

import leyden
import pytest
from leyden.engine.messages import EngineStats
from openai.types import Model

BOS, EOS, USER, ASSISTANT = range(256, 260)


async def test_health_is_200_only_while_the_engine_answers_and_the_server_stays(
    make_app, make_client, engine, error_of
):
    app = make_app()
    client = make_client(app)
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.head("/health")).status_code == 200
    app.state.draining = True
    response = await client.get("/health")
    assert error_of(response, 503)["type"] == "overloaded"
    assert response.headers["retry-after"]
    app.state.draining = False
    engine.is_healthy = False
    error_of(await client.get("/health"), 503)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"input": "a"}),
    ],
)
async def test_new_work_is_refused_while_draining_or_dead(make_app, make_client, engine, error_of, path, body):
    app = make_app()
    client = make_client(app)
    app.state.draining = True
    response = await client.post(path, json=body)
    assert "draining" in error_of(response, 503)["message"]
    assert response.headers["retry-after"]
    app.state.draining = False
    engine.is_healthy = False
    error_of(await client.post(path, json=body), 503)
    assert engine.requests == []


async def test_draining_lets_an_open_stream_finish(make_app, make_client, engine, eventually, chunks_of):
    app = make_app()
    engine.hold_after = 2
    asking = asyncio.create_task(make_client(app).post("/v1/completions", json={"prompt": "a", "stream": True}))
    await eventually(lambda: engine.num_open == 1)
    app.state.draining = True
    engine.hold_after = None
    assert chunks_of(await asking)[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_model_is_listed_with_its_context_length(client, engine):
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    card = body["data"][0]
    Model.model_validate(card, strict=True)
    assert (card["id"], card["max_model_len"]) == ("tiny", engine.info.max_model_len)
    assert (await client.get("/v1/models/tiny")).json() == card


@pytest.mark.parametrize("name", ["other", "", "tiny/", "a/b", "tiny%0d%0a"])
async def test_an_unknown_model_is_404(client, error_of, name):
    error_of(await client.get(f"/v1/models/{name}"), 404)


async def test_version_is_the_packages(client):
    assert (await client.get("/version")).json() == {"version": leyden.__version__}


async def test_tokenize_has_vllms_shape(client):
    response = await client.post("/tokenize", json={"prompt": "ab", "model": "tiny"})
    assert response.json() == {"count": 3, "max_model_len": 128, "tokens": [BOS, 97, 98], "token_strs": None}


async def test_tokenize_can_leave_special_tokens_out_and_show_the_strings(client):
    body = {"prompt": "aé", "add_special_tokens": False, "return_token_strs": True}
    answer = (await client.post("/tokenize", json=body)).json()
    assert answer["tokens"] == [97, 0xC3, 0xA9]
    assert answer["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]


async def test_tokenize_takes_messages(client):
    body = {"messages": [{"role": "user", "content": "a"}]}
    assert (await client.post("/tokenize", json=body)).json()["tokens"] == [BOS, USER, 97, EOS, ASSISTANT]


async def test_tokenize_of_long_text_runs_in_a_thread(client, tokenizer):
    response = await client.post("/tokenize", json={"prompt": "x" * 100_000, "return_token_strs": True})
    assert response.json()["count"] == 100_001
    assert threading.get_ident() not in tokenizer.threads


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"prompt": "a", "model": "other"}, "model"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template": "x"}, "chat_template"),
        ({"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": [{"role": "user", "content": "a"}], "parse_special": True}, "parse_special"),
    ],
)
async def test_a_bad_tokenize_request_is_refused_by_name(client, error_of, body, param):
    response = await client.post("/tokenize", json=body)
    assert error_of(response, 404 if param == "model" else 400)["param"] == param


async def test_detokenize_gives_the_text_with_its_control_tokens(client):
    response = await client.post("/detokenize", json={"tokens": [BOS, 97, 98]})
    assert response.json() == {"prompt": "<s>ab"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "tokens"),
        ({"tokens": "a"}, "tokens"),
        ({"tokens": [262]}, "tokens"),
        ({"tokens": [True]}, "tokens.0"),
        ({"tokens": [-1]}, "tokens.0"),
        ({"tokens": ["x"] * 100_000}, "tokens.0"),
    ],
    ids=str,
)
async def test_a_bad_detokenize_request_is_refused_by_name(client, error_of, body, param):
    assert error_of(await client.post("/detokenize", json=body), 400)["param"] == param


async def test_load_tells_sequences_slots_blocks_and_snapshots(client, engine):
    engine.stats = EngineStats(
        num_running=3,
        num_waiting=2,
        state_slots_used=4,
        kv_blocks_used=5,
        kv_blocks_cached=2,
        snapshots_used=3,
        host_snapshots_used=1,
        draft_tokens_total=9,
        accepted_tokens_total=7,
    )
    assert (await client.get("/load")).json() == {
        "server_load": 5,
        "num_requests_running": 3,
        "num_requests_waiting": 2,
        "state_slots_used": 4,
        "state_slots_total": 8,
        "kv_blocks_used": 5,
        "kv_blocks_cached": 2,
        "kv_blocks_total": 10,
        "snapshots_used": 3,
        "snapshots_total": 6,
        "host_snapshots_used": 1,
        "host_snapshots_total": 4,
        "draft_tokens_total": 9,
        "accepted_tokens_total": 7,
    }


async def test_server_info_tells_the_engine_and_not_where_files_lie(client, engine):
    response = await client.get("/server_info")
    facts = response.json()
    assert facts["version"] == leyden.__version__
    assert (facts["served_model_name"], facts["linear_backend"], facts["layer_counts"]["lightning"]) == (
        "tiny",
        "minimax",
        3,
    )
    assert facts["memory"]["weights"] == 400
    assert facts["max_body_bytes"] == 2_000_000
    assert (facts["speculative_tokens"], facts["speculative_max_rows"]) == (0, 0)
    assert engine.info.model_path not in response.text


async def test_model_info_has_the_fields_of_sglangs_router(client, engine):
    response = await client.get("/get_model_info")
    facts = response.json()
    assert (facts["model_path"], facts["served_model_name"], facts["is_generation"]) == ("tiny", "tiny", True)
    assert engine.info.model_path not in response.text
