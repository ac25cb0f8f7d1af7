"""Text over any `EngineClient`: the asynchronous counterpart of `LLM`, for a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from .boundary.client import EngineClient
from .messages import AddRequest
from .outputs import RequestOutput
from .text.detokenizer import StopScope, TextStream
from .text.tokenizer import Tokenizer


class AsyncLLM:
    """Detokenizes the engine's outputs, and finds stop strings. Aborts a sequence when its reader stops."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer) -> None:
        self.client = client
        self.tokenizer = tokenizer

    async def generate(
        self, request: AddRequest, shown_ids: frozenset[int] = frozenset(), stop_scope: StopScope | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yield the deltas of one answer; the last one has a finish_reason. Closing the iterator early aborts the
        sequence.

        shown_ids: control tokens that are shown even if the sampling parameters hide control tokens. stop_scope: the
        part of the answer in which stop strings count; None = everywhere. Raises the errors of `EngineClient.generate`.
        """
        text = TextStream(self.tokenizer, request.sampling_params, request.prompt_token_ids, shown_ids, stop_scope)
        async with aclosing(self.client.generate(request)) as steps:
            async for step in steps:
                output = text.push(step)
                yield output
                if output.finish_reason is not None:
                    return
