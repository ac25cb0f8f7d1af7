"""In which order prompts share a step's budget, and how much of each comes at once."""

from __future__ import annotations

from ..prefix.reuse import Reuse
from ..sequence import Sequence
from .siblings import Siblings

IN_ORDER_EVERY = 4  # steps with prompts


class PromptOrder:
    """Prompts under way and prompts that wait are computed by priority, then by the tokens that they still need, the
    fewest first. So a short prompt has its first token after a few steps, however long the others are.

    In one of `IN_ORDER_EVERY` steps with prompts they are computed by priority and arrival. So the earliest advances at
    that rate at least, however many short ones come.
    """

    def __init__(self, siblings: Siblings, reuse: Reuse) -> None:
        self._siblings = siblings
        self._stops = reuse.stops
        self._awaited: set[Sequence] = set()  # in this step, prompts whose next snapshot others wait for
        self._num_steps = 0  # with prompts

    def begin_step(self) -> None:
        """Another step is being filled: it is not known yet which prompts others wait for."""
        self._awaited.clear()

    def end_step(self, *, has_prompts: bool) -> None:
        """The step is filled."""
        self._num_steps += has_prompts

    def note_awaited(self, sequence: Sequence) -> None:
        """Another prompt waits for the snapshot at this one's next stop: no more than the way to it counts."""
        self._awaited.add(sequence)

    def rank(self, sequence: Sequence, num_cached: int = 0) -> tuple[int, int, int]:
        """The lowest is computed first. num_cached: tokens that a waiting sequence would find in the cache."""
        num_left = sequence.num_uncomputed_tokens - num_cached
        if sequence in self._awaited and sequence in self._stops:
            num_left = self._stops[sequence][0] - sequence.num_computed_tokens
        is_in_order = self._num_steps % IN_ORDER_EVERY == IN_ORDER_EVERY - 1
        return (sequence.priority, 0 if is_in_order else num_left, sequence.arrival)

    def next_chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens to compute of a prompt: up to its next snapshot. A leader whose siblings wait stops before its
        prompt's last token."""
        num_new = sequence.num_uncomputed_tokens
        if sequence in self._siblings:
            num_new -= 1
        if sequence in self._stops:
            num_new = min(num_new, self._stops[sequence][0] - sequence.num_computed_tokens)
        return min(num_new, budget)
