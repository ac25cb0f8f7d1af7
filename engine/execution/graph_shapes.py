"""The shapes of steps that have CUDA graphs."""

from __future__ import annotations

from typing import NamedTuple

from ...configs.schema import MAX_DRAFTS, EngineConfig
from .counts import Counts

PREFILL_TOKENS = (64, 128, 256, 512)  # beside decoding rows and without
PREFILL_TOKENS_ALONE = range(640, 2049, 128)
PREFILL_ROWS = 32  # the last row takes the padding tokens
SNAPSHOTS = 16  # places for snapshots on a prompt's way: 2,048 tokens seldom pass more rungs
VERIFY_TOKENS = MAX_DRAFTS + 1  # of a row: a token and its drafts


class GraphShape(NamedTuple):
    """The rows and tokens that a graph holds: `num_prefill_tokens` in `PREFILL_ROWS` rows, then decode rows. A shape of
    verify rows holds nothing else."""

    num_decodes: int
    num_prefill_tokens: int = 0  # 0 = no rows of prompts
    num_verifies: int = 0  # rows of up to VERIFY_TOKENS tokens; as many padding rows follow them

    @classmethod
    def of_drafts(cls, num_rows: int) -> GraphShape:
        """The shape of `num_rows` verify rows and nothing else."""
        return cls(0, num_rows * VERIFY_TOKENS, num_rows)

    @property
    def num_prefills(self) -> int:
        if self.num_verifies:
            return 2 * self.num_verifies
        return PREFILL_ROWS if self.num_prefill_tokens else 0

    @property
    def num_draws(self) -> int:
        """Rows of logits: one per row, or one per token in a shape of verify rows."""
        return self.num_tokens if self.num_verifies else self.num_rows

    @property
    def num_rows(self) -> int:
        return self.num_prefills + self.num_decodes

    @property
    def num_tokens(self) -> int:
        return self.num_prefill_tokens + self.num_decodes

    def holds(self, counts: Counts) -> bool:
        if counts.num_drafted or self.num_verifies:
            return 0 < counts.num_drafted <= self.num_verifies and counts.max_query_len <= VERIFY_TOKENS
        if counts.num_decodes > self.num_decodes:
            return False
        if not counts.num_prefills:
            return not self.num_prefills
        return counts.num_prefills < self.num_prefills and counts.num_prefill_tokens <= self.num_prefill_tokens


def graph_shapes(max_rows: int, max_tokens: int) -> list[GraphShape]:
    """The shapes worth a graph, increasing, for steps of at most `max_rows` decode rows and `max_tokens` tokens.

    Padding is bounded. Without prompts it is fewer than 8 decode rows in shapes up to 64, 16 up to 256, 32 above;
    beside prompts it is fewer than 64 decode rows. Shapes of more than 512 prompt tokens hold no decode rows, and at
    most a fifth of their tokens is padding.
    """
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows, 32)]
    beside = [0, 16, *range(64, max_rows, 64)]
    shapes = [GraphShape(size) for size in (*(size for size in steps if size < max_rows), max_rows)]
    for tokens in PREFILL_TOKENS:
        if tokens <= max_tokens:
            sizes = (*(size for size in beside if size < max_rows), max_rows)
            shapes += [GraphShape(size, tokens) for size in sizes]
    shapes += [GraphShape(0, tokens) for tokens in PREFILL_TOKENS_ALONE if tokens <= max_tokens]
    return sorted(shapes, key=lambda shape: (shape.num_tokens, shape.num_rows))


def shapes_for(config: EngineConfig, num_slots: int, *, prompts: bool = True) -> list[GraphShape]:
    """The shapes whose graphs serving captures, by increasing size. prompts: whether some hold prompts."""
    most_rows = min(num_slots, config.max_graph_rows)
    shapes = graph_shapes(most_rows, config.max_num_batched_tokens if prompts else 0)
    if config.speculative_tokens:
        most = min(most_rows, config.speculative_max_rows, config.max_num_batched_tokens - 1)  # a draft needs room, too
        shapes += [GraphShape.of_drafts(rows) for rows in doubling(most)]
    return sorted(shapes, key=lambda shape: (shape.num_tokens, shape.num_rows))


def doubling(last: int) -> list[int]:
    """1, 2, 4, ... and `last`; nothing for 0."""
    return [*(1 << i for i in range(last.bit_length()) if 1 << i < last), last] if last else []
