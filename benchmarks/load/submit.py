"""Random requests for an engine that is driven step by step."""

from __future__ import annotations

import random

from ...engine.core import EngineCore
from ...engine.messages import AddRequest
from ...engine.sampling_params import SamplingParams
from ...engine.text.token_ids import TokenIds


def random_requests(core: EngineCore, num_requests: int, prompt: int, answer: int, *, seed: int) -> list[AddRequest]:
    """Greedy requests of `prompt` random token ids each that answer exactly `answer` tokens."""
    choose = random.Random(f"{seed}/{num_requests}/{prompt}")
    vocabulary = range(core.runner.served.spec.vocab_size)
    params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
    return [
        AddRequest(
            request_id=f"bench-{index}",
            prompt_token_ids=TokenIds(choose.choices(vocabulary, k=prompt)),
            sampling_params=params,
        )
        for index in range(num_requests)
    ]


def submit(core: EngineCore, requests: list[AddRequest]) -> None:
    for request in requests:
        core.add_request(request)


def clear(core: EngineCore, requests: list[AddRequest]) -> None:
    """Abort the requests and finish the step that is under way."""
    for request in requests:
        core.abort_request(request.request_id)
    while core.has_work:
        core.step()
