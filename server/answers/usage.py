"""Token counts of an answer so far: `usage` of a whole answer and of the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from ...engine.outputs import RequestOutput
from ..door.choices import Choice
from ..door.prompts import Prompt
from ..wire.answers import CompletionTokensDetails, PromptTokensDetails, Usage
from ..wire.requests import StreamOptions


class UsageCounter:
    """Tokens of one request, counted as its outputs come.

    Each prompt counts once, however many choices continue it: the first choice computes it, and the others copy it.
    Cached tokens are therefore those of the first choice.
    """

    def __init__(
        self, prompts: Sequence[Prompt], num_choices: int, options: StreamOptions | None, *, thinks: bool
    ) -> None:
        """thinks: the answers are read for thoughts, whose tokens are told too."""
        self._num_prompt_tokens = [len(prompt.token_ids) for prompt in prompts]
        self._num_cached_tokens = [0] * len(prompts)
        self._num_output_tokens = [0] * num_choices
        self._num_reasoning_tokens = [0] * num_choices
        self._options = options
        self._thinks = thinks

    def observe(self, choice: Choice, output: RequestOutput, num_reasoning_tokens: int = 0) -> None:
        """num_reasoning_tokens: of the whole answer so far, as `output.num_output_tokens`."""
        self._num_output_tokens[choice.index] = output.num_output_tokens
        self._num_reasoning_tokens[choice.index] = num_reasoning_tokens
        if choice.is_first and output.num_cached_tokens is not None:
            self._num_cached_tokens[choice.prompt_index] = output.num_cached_tokens

    def total(self) -> Usage:
        counts = (self._num_prompt_tokens, self._num_cached_tokens, self._num_output_tokens, self._num_reasoning_tokens)
        return self._usage(*map(sum, counts))

    def at_end(self) -> Usage | None:
        """`usage` of the chunk that ends a stream; None without `include_usage`: there is no such chunk."""
        return self.total() if self._options is not None and self._options.include_usage else None

    def of_chunk(
        self, choice: Choice, num_output_tokens: int, num_reasoning_tokens: int = 0
    ) -> Usage | UnsetType | None:
        """`usage` of a chunk before the last: that of its choice so far with `continuous_usage_stats`, null with
        `include_usage` alone, else left out."""
        options = self._options
        if options is not None and options.continuous_usage_stats:
            prompt = choice.prompt_index
            num_prompt_tokens, num_cached_tokens = self._num_prompt_tokens[prompt], self._num_cached_tokens[prompt]
            return self._usage(num_prompt_tokens, num_cached_tokens, num_output_tokens, num_reasoning_tokens)
        return None if options is not None and options.include_usage else UNSET

    def _usage(self, num_prompt: int, num_cached: int, num_output: int, num_reasoning: int) -> Usage:
        usage = Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(num_cached))
        if self._thinks:
            usage.completion_tokens_details = CompletionTokensDetails(num_reasoning)
        return usage
