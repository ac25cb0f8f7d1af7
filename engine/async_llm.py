"""Text over any `EngineClient`: the asynchronous twin of `LLM`, for a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from .boundary.client import EngineClient
from .messages import AddRequest
from .outputs import RequestOutput
from .sampling_params import SamplingParams
from .text.detokenizer import StopScope, TextStream
from .text.token_ids import TokenIds
from .text.tokenizer import Tokenizer


class AsyncLLM:
    """Detokenizes what the engine gives, finds stop strings, and aborts what is no longer wanted."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, *, max_queue_seconds: float | None = None) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.max_queue_seconds = max_queue_seconds

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: TokenIds,
        params: SamplingParams,
        priority: int = 0,
        shown_ids: frozenset[int] = frozenset(),
        *,
        prefix_cache: bool = True,
        cache_salt: str | None = None,
        beginning: int = 0,
        num_siblings: int = 0,
        sibling_of: str | None = None,
        session_id: str | None = None,
        stop_scope: StopScope | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Deltas of one answer; the last one has a finish_reason. `shown_ids`: control tokens that are text even where
        `params` hide them. `prefix_cache`, `cache_salt`, `beginning`, siblings (several answers to one prompt) and a
        session's id, under which it can be saved: see `AddRequest`. `stop_scope` tells where in the answer stop strings
        count; None: everywhere. Closing the iterator early aborts the sequence.

        Raises what `EngineClient.generate` raises.
        """
        request = AddRequest(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            sampling_params=params,
            priority=priority,
            eos_token_ids=sorted(self.tokenizer.eos_token_ids),
            prefix_cache=prefix_cache,
            cache_salt=cache_salt,
            beginning=beginning,
            num_siblings=num_siblings,
            sibling_of=sibling_of,
            session_id=session_id,
            max_queue_seconds=self.max_queue_seconds,
        )
        text = TextStream(self.tokenizer, params, prompt_token_ids, shown_ids, stop_scope)
        async with aclosing(self.client.generate(request)) as steps:  # type: ignore[type-var]
            async for step in steps:
                output = text.push(step)
                yield output
                if output.finish_reason is not None:
                    return
