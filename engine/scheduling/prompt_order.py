"""The order in which prompts share a step's token budget, and the size of each prompt's next chunk."""

from __future__ import annotations

from ..prefix.reuse import Reuse
from ..sequence import Sequence
from .siblings import Siblings

IN_ORDER_EVERY = 4  # steps with prompts


class PromptOrder:
    """Orders prompts, running and waiting, by priority and then by the tokens left to compute, the fewest first. So a
    short prompt gets its first token after a few steps, however long the others are.

    One in `IN_ORDER_EVERY` steps with prompts orders them by priority and arrival instead. So the earliest prompt
    advances at least at that rate, however many short ones arrive.
    """

    def __init__(self, siblings: Siblings, reuse: Reuse) -> None:
        self._siblings = siblings
        self._stops = reuse.stops
        self._awaited: set[Sequence] = set()  # prompts whose next snapshot a waiting prompt needs, as of this step
        self._num_steps = 0  # steps with prompts

    def begin_step(self) -> None:
        """Start to fill a step. Forgets which prompts were awaited in the step before."""
        self._awaited.clear()

    def end_step(self, *, has_prompts: bool) -> None:
        """Count the step that has been filled."""
        self._num_steps += has_prompts

    def note_awaited(self, sequence: Sequence) -> None:
        """Note that another prompt waits for the snapshot at this prompt's next stop. Its rank then counts only the
        tokens up to that stop."""
        self._awaited.add(sequence)

    def rank(self, sequence: Sequence, num_cached: int = 0) -> tuple[int, int, int]:
        """The sort key of a prompt: the lowest is computed first. num_cached: tokens of a waiting prompt that the
        prefix cache holds."""
        num_left = sequence.num_uncomputed_tokens - num_cached
        if sequence in self._awaited and sequence in self._stops:
            num_left = self._stops[sequence][0] - sequence.num_computed_tokens
        is_in_order = self._num_steps % IN_ORDER_EVERY == IN_ORDER_EVERY - 1
        return (sequence.priority, 0 if is_in_order else num_left, sequence.arrival)

    def next_chunk(self, sequence: Sequence, budget: int) -> int:
        """The number of a prompt's tokens to compute in this step, at most `budget`. A chunk ends at the prompt's next
        stop. The chunk of a leader whose siblings wait ends before its prompt's last token."""
        num_new = sequence.num_uncomputed_tokens
        if sequence in self._siblings:
            num_new -= 1
        if sequence in self._stops:
            num_new = min(num_new, self._stops[sequence][0] - sequence.num_computed_tokens)
        return min(num_new, budget)
