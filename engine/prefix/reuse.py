"""What sequences take from the prefix cache and leave in it, and which waits for which.

A prompt is computed in chunks that end where a snapshot is worth while: where it parts from another prompt, or is
told that it is likely to; and before its last token, which every sequence has to feed to get its first one. On the way
it leaves rungs (`engine/prefix/ladder.py`), which cut no chunk. An answer that is complete leaves a snapshot at its
end, where the next turn of a conversation begins.
"""

from __future__ import annotations

import bisect
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from ..memory.operations import Fold, OperationQueue, Restore, Save, StepSave
from ..sequence import Sequence
from .cache import Match, PrefixCache
from .conversations import Conversations
from .ladder import Ladder
from .radix_tree import common_prefix

NOTHING = Match(None, 0)
ANSWER_TOKENS = 16  # that an answer's end must spare: it costs no step, and is where the next turn goes on
SHARE_OF_RUNGS = 8  # one place of so many is for rungs alone
MAX_WAITS = 4  # sequences that one waits for in its life, one after another


@dataclass(slots=True)
class _Use:
    """What a sequence has to do with the cache, from its arrival to its end."""

    wanted_stops: set[int]  # where its prompt parts from others, known before it starts
    num_cached: int | None = None  # tokens that it began with; None until it is first admitted
    waits_for: Sequence | None = None  # the prompt whose snapshot it waits for, before it starts
    awaited_stop: int = 0  # the stop of that prompt at which the snapshot is made
    num_waits: int = 0  # prompts it has waited for


class Reuse:
    """The cache as the scheduler sees it. It adds to `operations` whatever must be done before the next step.

    stops: of each running sequence whose prompt will be saved on its way, after how many tokens; increasing, never
    empty. Read by the scheduler, written here alone.
    """

    def __init__(self, cache: PrefixCache, operations: OperationQueue, interval: int, every: int) -> None:
        self.cache = cache
        self.blocks = cache.blocks
        self.ladder = Ladder(cache.min_tokens, interval, every)
        cache.num_for_rungs = cache.num_snapshots // SHARE_OF_RUNGS if interval else 0
        self._operations = operations
        self.conversations = Conversations(cache)
        self.stops: dict[Sequence, list[int]] = {}
        self._uses: dict[Sequence, _Use] = {}  # of every sequence that uses the cache
        self.num_queried_tokens = 0
        self.num_cached_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """The sequence may come to use the cache."""
        request = sequence.request
        if request.uses_cache:
            self._uses[sequence] = _Use({request.beginning} if request.beginning else set())

    def forget(self, sequence: Sequence) -> None:
        """The sequence is gone."""
        self.stops.pop(sequence, None)
        self._uses.pop(sequence, None)

    def pause(self, sequence: Sequence) -> None:
        """The sequence is preempted: it is saved nowhere before it starts again."""
        self.stops.pop(sequence, None)

    def num_cached(self, sequence: Sequence) -> int:
        """Tokens that the sequence found in the cache when it was first admitted."""
        use = self._uses.get(sequence)
        return 0 if use is None or use.num_cached is None else use.num_cached

    def find(self, sequence: Sequence) -> Match:
        """What is known of the sequence's tokens but for the last, which has to be fed in any case."""
        if sequence not in self._uses or not self.cache.num_snapshots:
            return NOTHING
        return self.cache.match(sequence.known_tokens(sequence.num_tokens - 1), sequence.request.cache_salt)

    def missing(self, sequence: Sequence, match: Match) -> int:
        """Blocks that the sequence needs for its tokens beyond those that it would share."""
        return self.blocks.blocks_for(sequence.num_tokens) - match.num_cached // self.blocks.block_size

    def resume(self, sequence: Sequence, match: Match, promised: int = 0) -> bool:
        """Give the sequence, which has a slot, what the match found, and blocks up to its first chunk at least. False,
        and nothing has changed, when there is no room for all of its tokens beside blocks `promised` to others."""
        size = self.blocks.block_size
        table = self.cache.use(match.node) if match.node is not None else []
        self.blocks.share(sequence, table[: match.num_cached // size])
        if not self.cache.make_room(self.missing(sequence, match) + promised, match.node):
            self.blocks.release(sequence)
            return False
        if match.node is not None:
            self._restore(sequence, match, table)
        use = self._uses.get(sequence)
        if use is not None and use.num_cached is None:
            use.num_cached = match.num_cached
            self.num_queried_tokens += sequence.num_prompt_tokens
            self.num_cached_tokens += match.num_cached
        return True

    def _restore(self, sequence: Sequence, match: Match, table: list[int]) -> None:
        node = match.node
        assert node is not None and node.snapshot is not None and sequence.state_slot is not None
        partial = []
        if node.end % self.blocks.block_size:  # the sequence goes on in a copy of the last block
            self.blocks.grow(sequence, node.end)
            partial = [(table[-1], sequence.block_table[-1])]
        self._operations.add(Restore(node.snapshot, sequence.state_slot, partial))
        sequence.num_computed_tokens = node.end

    def plan(self, sequence: Sequence, match: Match, others: Iterable[Sequence]) -> None:
        """Choose the stops of a prompt that starts: where it will be saved. `others` wait, and may share its start."""
        use = self._uses.get(sequence)
        if use is None:
            return
        use.waits_for = None  # else each would keep the one before it alive, and that one its own
        if not self.cache.num_snapshots:
            return
        last = sequence.num_prompt_tokens - 1
        for stop in use.wanted_stops:  # first those that more than one is likely to hit
            self.add_stop(sequence, stop)
        self.add_stop(sequence, match.num_shared)
        for other in others:
            self.add_stop(sequence, self._common(sequence, other))
        self.add_stop(sequence, last)

    def add_stop(self, sequence: Sequence, stop: int) -> bool:
        """Let the sequence be saved after `stop` tokens, too, if that is far enough from where it is and will be."""
        stops = self.stops.get(sequence, [])
        near = [sequence.num_computed_tokens, *stops]
        is_ahead = sequence.num_computed_tokens < stop < sequence.num_prompt_tokens
        if not is_ahead or min(abs(stop - other) for other in near) < self.cache.min_tokens:
            return False
        bisect.insort(stops, stop)
        self.stops[sequence] = stops
        return True

    def save_at_stop(self, sequence: Sequence) -> None:
        """Save a sequence that has come to a stop, or past one."""
        stops = self.stops.pop(sequence, [])
        if sequence.num_computed_tokens in stops:
            self._save(sequence)
        ahead = [stop for stop in stops if stop > sequence.num_computed_tokens]
        if ahead:
            self.stops[sequence] = ahead

    def leave_rungs(self, prefilling: Mapping[Sequence, int]) -> list[StepSave]:
        """Keep states that the prompts of the coming step's first rows pass, where the cache has room. `prefilling`:
        the tokens of each row, which have their blocks. Nothing may look for a match between this and the step."""
        passed = []
        for row, (sequence, num_new) in enumerate(prefilling.items()):
            if sequence in self._uses and self.cache.num_snapshots:
                start = sequence.num_computed_tokens
                end = min(start + num_new, sequence.num_prompt_tokens - 2)  # before the last token there is a stop
                passed += [(level, row, sequence, at) for at, level in self.ladder.between(start, end)]
        if not passed:
            return []
        self.cache.next_step()
        snapshots = []
        passed.sort(key=lambda rung: -rung[0])  # where room is scarce, those that are forgotten last
        for level, row, sequence, at in passed:
            table = sequence.block_table[: self.blocks.blocks_for(at)].tolist()
            snapshot = self.cache.insert_rung(sequence.known_tokens(at), table, sequence.request.cache_salt, level)
            if snapshot is not None:
                snapshots.append(StepSave(row, at - sequence.num_computed_tokens, snapshot))
        return snapshots

    def save_answer(self, sequence: Sequence) -> None:
        """Save a sequence that is complete, with its answer; one of a session however little that spares."""
        if sequence not in self._uses or sequence.state_slot is None:
            return
        session_id, salt = sequence.request.session_id, sequence.request.cache_salt
        if session_id is None:
            self._save(sequence, min(self.cache.min_tokens, ANSWER_TOKENS))
            return
        self._save(sequence, min_tokens=1)
        tokens = sequence.known_tokens(sequence.num_computed_tokens)
        node = self.cache.match(tokens, salt).node
        is_whole = node is not None and node.end == len(tokens)
        self.conversations.note(session_id, node if is_whole else None, salt)

    def _save(self, sequence: Sequence, min_tokens: int | None = None) -> None:
        assert sequence.state_slot is not None
        tokens = sequence.known_tokens(sequence.num_computed_tokens)
        table = sequence.block_table.tolist()
        snapshot, moves = self.cache.insert(tokens, table, sequence.request.cache_salt, min_tokens)
        self._operations.add(*moves)
        if snapshot is not None:
            self.fold(sequence)
            self._operations.add(Save(sequence.state_slot, snapshot))

    def fold(self, sequence: Sequence) -> None:
        """Let nothing wait in the ring of the sequence's slot."""
        if sequence.num_pending_tokens:
            assert sequence.state_slot is not None
            self._operations.add(Fold(sequence.state_slot, sequence.num_pending_tokens, sequence.num_computed_tokens))
            sequence.num_pending_tokens = 0

    def awaited(self, sequence: Sequence) -> Sequence | None:
        """The prompt under way that will leave the snapshot for which the sequence waits, or None."""
        use = self._uses.get(sequence)
        if use is None or use.waits_for is None or use.awaited_stop not in self.stops.get(use.waits_for, ()):
            return None
        return use.waits_for

    def wait_for(self, sequence: Sequence, match: Match, running: Iterable[Sequence]) -> Sequence | None:
        """A prompt under way that will soon leave a snapshot that spares this one at least `min_tokens`, for which the
        sequence waits from now on; None where there is none."""
        use = self._uses.get(sequence)
        if use is None or not self.cache.num_snapshots or use.num_waits >= MAX_WAITS:
            return None
        for other in running:
            if other not in self.stops or other.request.cache_salt != sequence.request.cache_salt:
                continue
            common = self._common(sequence, other)
            if common - match.num_cached < self.cache.min_tokens:
                continue
            stop = self._next_stop(other, common)
            if stop - match.num_cached >= self.cache.min_tokens:
                if use.waits_for is not other:
                    use.waits_for = other
                    use.num_waits += 1
                use.awaited_stop = stop
                return other
            use.wanted_stops.add(common)  # the other has gone past it: this one will leave it
        return None

    def check_integrity(self, alive: Container[Sequence], running: Container[Sequence]) -> None:
        """Nothing is kept of a sequence that is gone, and only what runs has stops. Raises AssertionError."""
        assert all(sequence in alive for sequence in self._uses)
        for sequence, stops in self.stops.items():
            assert sequence in running and stops and stops == sorted(set(stops))
        assert all(use.waits_for is None for sequence, use in self._uses.items() if sequence in running)

    def _next_stop(self, other: Sequence, common: int) -> int:
        """Where a prompt under way will next be saved within what is common; 0 when nowhere."""
        self.add_stop(other, common)
        return max((stop for stop in self.stops.get(other, ()) if stop <= common), default=0)

    def _common(self, sequence: Sequence, other: Sequence) -> int:
        """Tokens that both prompts begin with, but for the last of either."""
        size = min(sequence.num_prompt_tokens, other.num_prompt_tokens) - 1
        if other not in self._uses or sequence.request.cache_salt != other.request.cache_salt:
            return 0
        return common_prefix(sequence.known_tokens(size), other.known_tokens(size))
