"""When tokens come faster than a reader takes them: fewer chunks, and the same answer."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest
from callers import Caller
from leyden.configs.schema import EngineConfig, ServerConfig
from leyden.engine.async_llm import AsyncLLM
from leyden.engine.boundary.client import EngineClient
from leyden.engine.messages import AddRequest, EngineStats, StepOutputs
from leyden.server.http.app import create_app


class PilingClient(EngineClient):
    """The real client over the scripted engine, whose outputs arrive `num_piled` at a time."""

    def __init__(self, engine, num_piled=1):
        super().__init__(EngineConfig())
        self.num_piled = num_piled
        self._engine = engine
        self._tasks = []

    async def _launch(self):
        self._receive(self._engine.info)

    async def _stop(self):
        for task in self._tasks:
            task.cancel()

    def _send(self, message):
        if isinstance(message, AddRequest):
            self._tasks.append(asyncio.create_task(self._feed(message)))

    async def _feed(self, request):
        pile = []
        async for output in self._engine._outputs(request):
            pile.append(output)
            if len(pile) >= self.num_piled or output.finish_reason is not None:
                for each in pile:
                    self._receive(StepOutputs(outputs=[each], stats=EngineStats()))
                pile.clear()

    def num_waiting(self):
        """(outputs, token ids) that no reader has taken yet."""
        outputs = [output for stream in self._streams.values() for output in stream._outputs]
        return len(outputs), sum(len(output.token_ids) for output in outputs)


@pytest.fixture
async def piling(engine):
    engine.count_cached = lambda request: 1
    client = PilingClient(engine)
    await client.start()
    yield client
    await client.close()


@pytest.fixture
def make_app(piling, tokenizer):
    return lambda: create_app(AsyncLLM(piling, tokenizer), ServerConfig(), model_name="tiny")


def joined(chunks):
    """What a stream says in all: of each choice its text, ids, log-probabilities and reasons, and the usage."""
    choices = defaultdict(lambda: {"text": "", "token_ids": [], "logprobs": defaultdict(list), "reasons": []})
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices[part["index"]]
            choice["text"] += part["text"] if "text" in part else part["delta"].get("content", "")
            choice["token_ids"] += part.get("token_ids", [])
            for key, values in (part["logprobs"] or {}).items():
                choice["logprobs"][key] += values or []
            choice["reasons"] += [part["finish_reason"]] if part["finish_reason"] else []
    return dict(choices), chunks[-1]["usage"]


BODIES = {
    "plain": {},
    "multibyte characters": {"prompt": "é"},
    "logprobs": {"logprobs": 2},
    "echo with logprobs": {"echo": True, "logprobs": 1},
    "a stop string": {"stop": ["o, w"], "logprobs": 0},
    "a stop string that is shown": {"stop": ["lo"], "include_stop_str_in_output": True},
    "a stop string after min_tokens": {"stop": ["l"], "min_tokens": 3},
    "a stop token": {"stop_token_ids": [ord("w")]},
    "a bound": {"max_tokens": 7},
    "choices": {"prompt": ["a", "b"], "n": 2, "logprobs": 1},
    "choices with a stop string": {"n": 3, "stop": ["world", "ell"]},
}


@pytest.mark.parametrize("num_piled", [2, 3, 100])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_piled_up_tokens_make_fewer_chunks_and_the_same_answer(
    complete, chunks_of, engine, piling, body, num_piled
):
    engine.choose_reply = lambda request: b"Hello, world" if len(request.prompt_token_ids) < 3 else "aé€😀é".encode()
    options = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    expected = chunks_of(await complete(**body, **options))
    piling.num_piled = num_piled
    chunks = chunks_of(await complete(**body, **options))
    assert joined(chunks) == joined(expected)
    assert len(chunks) < len(expected)
    whole = (await complete(**body, return_token_ids=True)).json()
    assert joined(chunks) == joined([whole])


@pytest.mark.parametrize("body", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}, {"stop": ["o, "]}])
async def test_the_same_in_a_chat(chat, chunks_of, piling, body):
    options = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    expected = chunks_of(await chat(**body, **options))
    piling.num_piled = 100
    chunks = chunks_of(await chat(**body, **options))
    assert joined(chunks) == joined(expected)
    num_choices = body.get("n", 1)
    assert len(chunks) == 3 * num_choices + 1, "per choice its role, all of its text and its reason; then usage"


@pytest.mark.parametrize("num_piled", [1, 2, 7, 100])
@pytest.mark.parametrize(
    ("reply", "num_reasoning"),
    [
        ("<think>\nHm, é.\n</think>\n\nSunny", len("<think>\nHm, é.\n</think>".encode())),
        ("<think>Hm", len("<think>Hm") + 1),  # and the token that ends it all
        ("Sunny", 0),
    ],
    ids=["a thought and words", "an open thought", "words"],
)
async def test_reasoning_tokens_are_counted_however_many_pile_up(
    make_client, engine, tokenizer, piling, chunks_of, reply, num_reasoning, num_piled
):
    tokenizer.chat_template = "<think>"
    engine.reply = reply.encode()
    piling.num_piled = num_piled
    client, expected = make_client(), {"reasoning_tokens": num_reasoning}
    answer = (await client.post("/v1/responses", json={"input": "Hi"})).json()
    assert answer["usage"]["output_tokens_details"] == expected
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    for n in (1, 2):  # choices, whose thoughts are counted together
        answer = (await client.post("/v1/chat/completions", json=asked | {"n": n})).json()
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": n * num_reasoning}
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = chunks_of(await client.post("/v1/chat/completions", json=asked | options))
    counts = [chunk["usage"]["completion_tokens_details"]["reasoning_tokens"] for chunk in chunks]
    assert counts[0] == 0 and counts[-1] == num_reasoning and counts == sorted(counts)


async def test_continuous_usage_counts_the_tokens_of_each_chunk(complete, chunks_of, piling):
    piling.num_piled = 5
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = chunks_of(await complete(stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [5, 10, 13, 13]


async def test_tokens_before_a_failure_are_shown_before_it(complete, chunks_of, engine, piling):
    engine.fail_after = 4
    piling.num_piled = 100
    *chunks, failure = chunks_of(await complete(stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hell"]
    assert failure["error"]["code"] == "generation_failed"


@pytest.mark.parametrize("n", [1, 2])
async def test_outputs_for_a_stopped_reader_wait_as_ids_in_one_output_per_choice(
    make_app, engine, piling, eventually, n
):
    engine.reply = b"~" * 100
    slow = Caller(make_app(), {"prompt": "a", "n": n, "max_tokens": 100, "stream": True})
    slow.reads_until = 4
    await eventually(lambda: all(task.done() for task in piling._tasks) and len(slow.messages) == 4)
    num_outputs, num_ids = piling.num_waiting()
    assert num_outputs == n
    assert 80 * n < num_ids <= 100 * n
    num_sent = len(slow.messages)
    slow.reads_until = None
    await slow.ended()
    assert b"".join(message["body"] for message in slow.messages[1:]).count(b"~") == 100 * n
    assert len(slow.messages) - num_sent <= 6 * n, "the hundred tokens did not become as many chunks"
