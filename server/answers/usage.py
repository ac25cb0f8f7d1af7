"""Token counts of an answer so far: `usage` of a whole answer and of the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from ...engine.outputs import RequestOutput
from ..door.choices import Choice
from ..door.prompts import Prompt
from ..wire.answers import PromptTokensDetails, Usage
from ..wire.requests import StreamOptions


class UsageCounter:
    """Tokens of one request, counted as its outputs come.

    Each prompt counts once, however many choices continue it: the first choice computes it, and the others copy it.
    Cached tokens are therefore those of the first choice.
    """

    def __init__(self, prompts: Sequence[Prompt], num_choices: int, options: StreamOptions | None) -> None:
        self._num_prompt_tokens = [len(prompt.token_ids) for prompt in prompts]
        self._num_cached_tokens = [0] * len(prompts)
        self._num_output_tokens = [0] * num_choices
        self._options = options

    def observe(self, choice: Choice, output: RequestOutput) -> None:
        self._num_output_tokens[choice.index] = output.num_output_tokens
        if choice.is_first and output.num_cached_tokens is not None:
            self._num_cached_tokens[choice.prompt_index] = output.num_cached_tokens

    def total(self) -> Usage:
        return _usage(sum(self._num_prompt_tokens), sum(self._num_cached_tokens), sum(self._num_output_tokens))

    def at_end(self) -> Usage | None:
        """`usage` of the chunk that ends a stream; None without `include_usage`: there is no such chunk."""
        return self.total() if self._options is not None and self._options.include_usage else None

    def of_chunk(self, choice: Choice, num_output_tokens: int) -> Usage | UnsetType | None:
        """`usage` of a chunk before the last: that of its choice so far with `continuous_usage_stats`, null with
        `include_usage` alone, else left out."""
        options = self._options
        if options is not None and options.continuous_usage_stats:
            prompt = choice.prompt_index
            return _usage(self._num_prompt_tokens[prompt], self._num_cached_tokens[prompt], num_output_tokens)
        return None if options is not None and options.include_usage else UNSET


def _usage(num_prompt_tokens: int, num_cached_tokens: int, num_output_tokens: int) -> Usage:
    total = num_prompt_tokens + num_output_tokens
    return Usage(num_prompt_tokens, num_output_tokens, total, PromptTokensDetails(num_cached_tokens))
