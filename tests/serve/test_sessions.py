"""A conversation outlives the server that computed it."""

from __future__ import annotations

import signal

import httpx
import openai
import pytest

MESSAGES = [{"role": "user", "content": "Tell me of the river. " * 8}]


def chat(served, messages, **fields):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    extra = {"session_id": "river", "return_token_ids": True}
    return client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=20, temperature=0, extra_body=extra, **fields
    )


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut by a stop string"])
def test_a_conversation_goes_on_after_a_restart(serve, tmp_path, is_cut):
    settings = ("--session-folder", str(tmp_path / "saved"), "--snapshot-min-tokens", "16")
    first = serve(*settings)
    answer = chat(first, MESSAGES)
    if is_cut:
        text = answer.choices[0].message.content
        answer = chat(first, MESSAGES, stop=next(char for char in text[4:] if char.isascii() and char.isprintable()))
        assert answer.choices[0].finish_reason == "stop"
    saved = httpx.post(f"{first.url}/v1/sessions/river/save").json()
    assert saved["tokens"] >= answer.usage.prompt_tokens
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(timeout=30) == 0

    turn = [*MESSAGES, {"role": "assistant", "content": answer.choices[0].message.content}]
    turn.append({"role": "user", "content": "And the sea?"})
    second = serve(*settings)
    expected = chat(second, turn).choices[0].message.content  # computed anew
    third = serve(*settings)
    assert [each["id"] for each in httpx.get(f"{third.url}/v1/sessions").json()["data"]] == ["river"]
    restored = httpx.post(f"{third.url}/v1/sessions/river/restore").json()
    assert (restored["tokens"], restored["bytes"]) == (saved["tokens"], saved["bytes"])
    assert chat(third, turn).choices[0].message.content == expected
    hits = third.gauge("prefix_cache_hits_total")
    assert hits >= answer.usage.prompt_tokens - 1
    third.wait_idle()

    assert httpx.delete(f"{third.url}/v1/sessions/river").json()["deleted"]
    missing = httpx.post(f"{third.url}/v1/sessions/river/restore")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "session_not_found")
