"""The official client against a real socket: it validates what it reads, and nobody here wrote it."""

from __future__ import annotations

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def live(make_live):
    return make_live(api_key=["key"])


@pytest.fixture
async def official(live):
    async with openai.AsyncOpenAI(
        base_url=f"{live.url}/v1", api_key="key", max_retries=0, timeout=20, _strict_response_validation=True
    ) as client:
        yield client


async def test_models_are_listed_and_retrieved(official):
    models = await official.models.list()
    assert [model.id for model in models.data] == ["tiny"]
    assert (await official.models.retrieve("tiny")).id == "tiny"


async def test_completion_whole_and_streamed_agree(live, official):
    whole = await official.completions.create(model="tiny", prompt="Hi", n=2, logprobs=1, seed=None)
    # The type of a streamed completion has no null finish_reason, though OpenAI sends it: no strict validation here.
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="key", max_retries=0) as lenient:
        stream = await lenient.completions.create(model="tiny", prompt="Hi", n=2, stream=True)
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices] == ["Hello, world"] * 2


async def test_chat_whole_and_streamed_agree(official):
    whole = await official.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
    stream = await official.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    async for chunk in stream:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content == "Hello, world"
    assert usage == whole.usage


async def test_the_accumulating_stream_helper_reads_our_events(official):
    async with official.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == "Hello, world"
    assert completion.choices[0].finish_reason == "stop"


async def test_errors_are_the_clients_typed_errors(official, engine):
    with pytest.raises(openai.BadRequestError) as caught:
        await official.completions.create(model="tiny", prompt="x", max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        await official.models.retrieve("other")
    with pytest.raises(openai.AuthenticationError):
        await official.with_options(api_key="wrong").models.list()
    engine.queue_bound = 0
    with pytest.raises(openai.RateLimitError):
        await official.completions.create(model="tiny", prompt="x")


async def test_an_error_in_mid_stream_raises_in_the_client(official, engine):
    engine.die_after = 3
    stream = await official.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="engine stopped"):
        async for _ in stream:
            pass


async def test_leaving_a_stream_aborts_it(official, engine, eventually):
    engine.hold_after = 2
    stream = await official.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await eventually(lambda: engine.num_aborted == 1)
    assert engine.num_open == 0
