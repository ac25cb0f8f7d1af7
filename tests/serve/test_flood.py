"""Ten times what the server has room for, all at once, against a real server process."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import httpx

MAX_CONNECTIONS, NUM_REQUESTS = 30, 300
LIMITS = ["--max-num-seqs", "4", "--max-waiting", "8", "--max-connections", str(MAX_CONNECTIONS)]
TIMEOUT = httpx.Timeout(60)
BODIES = [
    {"prompt": "x", "max_tokens": 20, "ignore_eos": True},
    {"prompt": "x", "max_tokens": 20, "ignore_eos": True, "stream": True},
    {"prompt": ["x", "y"], "n": 2, "max_tokens": 5},
    {"prompt": "x" * 500, "max_tokens": 3, "logprobs": 2},
]


def resident_bytes(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def ask(http: httpx.AsyncClient, index: int) -> int:
    """The status of one request, whose answer is checked to be whole and well formed."""
    body = BODIES[index % len(BODIES)]
    response = await http.post("/v1/completions", json=body)
    if response.status_code == 200:
        assert response.text.endswith("data: [DONE]\n\n") if "stream" in body else response.json()["choices"]
        return 200
    assert response.status_code in (429, 503), response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert int(response.headers["retry-after"]) >= 1
    return response.status_code


async def flood(url: str) -> Counter[int]:
    """Everybody comes at once, each over a socket of its own, while somebody keeps asking for the server's health."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as http:

        async def watch_health() -> None:
            while True:
                assert (await http.get("/health", timeout=10)).status_code == 200
                await asyncio.sleep(0.02)

        watching = asyncio.create_task(watch_health())
        statuses = await asyncio.gather(*[ask(http, index) for index in range(NUM_REQUESTS)])
        assert not watching.done(), watching
        watching.cancel()
        return Counter(statuses)


async def test_half_of_many_streams_leave_and_the_others_answer_as_if_alone(shared):
    prompts = [f"{index % 7} little words" for index in range(100)]

    async def stream(http: httpx.AsyncClient, prompt: str, leave_after: int | None = None) -> str:
        body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "stream": True, "ignore_eos": True}
        text = ""
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    if leave_after is not None and len(text) >= leave_after:
                        break
        return text

    async with httpx.AsyncClient(
        base_url=shared.url, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None)
    ) as http:
        alone = {prompt: await stream(http, prompt) for prompt in prompts[:7]}
        leavers = [stream(http, prompt, leave_after=index % 20) for index, prompt in enumerate(prompts)]
        others = [stream(http, prompt) for prompt in prompts]
        texts = await asyncio.gather(*[each for pair in zip(leavers, others, strict=True) for each in pair])
    assert texts[1::2] == [alone[prompt] for prompt in prompts]
    shared.wait_idle()


async def test_a_flood_is_answered_by_200_429_or_503_and_leaves_nothing_behind(serve):
    served = serve(*LIMITS)
    first = await flood(served.url)
    assert first[200] >= 4
    assert first[503] + first[429] > 0
    served.wait_idle()
    before = resident_bytes(served.process.pid) + resident_bytes(served.engine_pid)
    for _ in range(3):
        assert (await flood(served.url)).total() == NUM_REQUESTS
    served.wait_idle()
    after = resident_bytes(served.process.pid) + resident_bytes(served.engine_pid)
    assert after - before < 64_000_000, "memory grows with every flood"
    async with httpx.AsyncClient(base_url=served.url, timeout=TIMEOUT) as http:
        assert await ask(http, 0) == 200
