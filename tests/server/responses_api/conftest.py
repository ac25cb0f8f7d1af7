"""A model that thinks and calls tools behind /v1/responses."""

from __future__ import annotations

import msgspec
import pytest


@pytest.fixture
def respond(engine, tokenizer, make_client):
    """respond(reply, **body) -> response of /v1/responses, from a model that thinks and calls tools."""
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    tokenizer.chat_template = "<tool_call> <think>"

    async def ask(reply="Hello", **body):
        engine.reply = reply.encode()
        return await make_client().post("/v1/responses", json={"input": "Hi"} | body)

    return ask
