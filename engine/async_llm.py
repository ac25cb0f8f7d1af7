"""Text over any `EngineClient`: the asynchronous twin of `LLM`, for a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from .boundary.client import EngineClient
from .messages import AddRequest
from .outputs import RequestOutput
from .text.detokenizer import StopScope, TextStream
from .text.tokenizer import Tokenizer


class AsyncLLM:
    """Detokenizes the engine's outputs, finds stop strings, and aborts a sequence that is no longer wanted."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer) -> None:
        self.client = client
        self.tokenizer = tokenizer

    async def generate(
        self, request: AddRequest, shown_ids: frozenset[int] = frozenset(), stop_scope: StopScope | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Deltas of one answer; the last one has a finish_reason. Closing the iterator early aborts the sequence.

        `shown_ids`: control tokens that are text even where the sampling parameters hide them. `stop_scope` tells where
        in the answer stop strings count; None: everywhere. Raises what `EngineClient.generate` raises.
        """
        text = TextStream(self.tokenizer, request.sampling_params, request.prompt_token_ids, shown_ids, stop_scope)
        async with aclosing(self.client.generate(request)) as steps:
            async for step in steps:
                output = text.push(step)
                yield output
                if output.finish_reason is not None:
                    return
