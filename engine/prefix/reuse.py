"""The prefix cache as sequences use it: where they resume, where they leave snapshots, and which snapshots they await.

A prompt is computed in chunks that end at its *stops*, where a snapshot is saved:
- where another prompt parts from it, or is likely to (`AddRequest.beginning`);
- before its last token, which every sequence must feed to get its first answer token.

Between stops a prompt leaves rungs (`engine/prefix/ladder.py`), which end no chunk. A complete answer leaves a snapshot
at its end, where the next turn of the conversation resumes.
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
ANSWER_TOKENS = 16  # least tokens that a snapshot at an answer's end spares; few, because it ends no chunk
SHARE_OF_RUNGS = 8  # one in so many snapshots is reserved for rungs
MAX_WAITS = 4  # prompts that a sequence waits for at most, one after another


@dataclass(slots=True)
class _Use:
    """A sequence's use of the cache, from its arrival to its end."""

    wanted_stops: set[int]  # places where its prompt parts from others, collected before it starts
    num_cached: int | None = None  # tokens found in the cache at its first admission; None before
    waits_for: Sequence | None = None  # the running prompt whose snapshot it awaits; None once started
    awaited_stop: int = 0  # the stop of `waits_for` at which that snapshot is saved
    num_waits: int = 0  # prompts it has waited for


class Reuse:
    """The prefix cache as the scheduler sees it. Adds the operations that the next step needs to `operations`.

    stops: per running prompt that will be saved on its way, the numbers of tokens after which; increasing, never
    empty. The scheduler only reads it.
    """

    def __init__(self, cache: PrefixCache, operations: OperationQueue, interval: int, every: int) -> None:
        self.cache = cache
        self.blocks = cache.blocks
        self.ladder = Ladder(cache.min_tokens, interval, every)
        cache.num_for_rungs = cache.num_snapshots // SHARE_OF_RUNGS if interval else 0
        self._operations = operations
        self.conversations = Conversations(cache)
        self.stops: dict[Sequence, list[int]] = {}
        self._uses: dict[Sequence, _Use] = {}  # of every sequence whose request allows the cache
        self.num_queried_tokens = 0
        self.num_cached_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Note a new sequence."""
        request = sequence.request
        if request.uses_cache:
            self._uses[sequence] = _Use({request.beginning} if request.beginning else set())

    def forget(self, sequence: Sequence) -> None:
        """Drop a finished sequence."""
        self.stops.pop(sequence, None)
        self._uses.pop(sequence, None)

    def pause(self, sequence: Sequence) -> None:
        """Drop the stops of a preempted sequence. It gets new ones when it starts again."""
        self.stops.pop(sequence, None)

    def num_cached(self, sequence: Sequence) -> int:
        """Tokens that the sequence found in the cache when it was first admitted."""
        use = self._uses.get(sequence)
        return 0 if use is None or use.num_cached is None else use.num_cached

    def find(self, sequence: Sequence) -> Match:
        """Find the sequence's tokens in the cache. Leaves out the last one, which must be fed in any case."""
        if sequence not in self._uses or not self.cache.num_snapshots:
            return NOTHING
        return self.cache.match(sequence.known_tokens(sequence.num_tokens - 1), sequence.request.cache_salt)

    def missing(self, sequence: Sequence, match: Match) -> int:
        """The number of blocks that the sequence needs beside the blocks that it shares with the match."""
        return self.blocks.blocks_for(sequence.num_tokens) - match.num_cached // self.blocks.block_size

    def resume(self, sequence: Sequence, match: Match, promised: int = 0) -> bool:
        """Let the sequence, which has a slot, resume at the match: give it the shared blocks, and restore its state.

        Returns False, and changes nothing, if there is no room for all of its tokens beside blocks `promised` to
        others. Takes no blocks yet for tokens after the match.
        """
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
        if node.end % self.blocks.block_size:  # the sequence writes on in a copy of the last block
            self.blocks.grow(sequence, node.end)
            partial = [(table[-1], sequence.block_table[-1])]
        self._operations.add(Restore(node.snapshot, sequence.state_slot, partial))
        sequence.num_computed_tokens = node.end

    def plan(self, sequence: Sequence, match: Match, others: Iterable[Sequence]) -> None:
        """Choose the stops of a prompt that starts. others: waiting sequences, which may share a prefix with it."""
        use = self._uses.get(sequence)
        if use is None:
            return
        use.waits_for = None  # otherwise a chain of waits would keep finished sequences alive
        if not self.cache.num_snapshots:
            return
        last = sequence.num_prompt_tokens - 1
        for stop in use.wanted_stops:  # first, because several prompts are likely to resume there
            self.add_stop(sequence, stop)
        self.add_stop(sequence, match.num_shared)
        for other in others:
            self.add_stop(sequence, self._common(sequence, other))
        self.add_stop(sequence, last)

    def add_stop(self, sequence: Sequence, stop: int) -> bool:
        """Add a stop after `stop` tokens. Returns False, and adds none, if it is not ahead within the prompt, or is
        closer than `min_tokens` to the sequence's place or to another stop."""
        stops = self.stops.get(sequence, [])
        near = [sequence.num_computed_tokens, *stops]
        is_ahead = sequence.num_computed_tokens < stop < sequence.num_prompt_tokens
        if not is_ahead or min(abs(stop - other) for other in near) < self.cache.min_tokens:
            return False
        bisect.insort(stops, stop)
        self.stops[sequence] = stops
        return True

    def save_at_stop(self, sequence: Sequence) -> None:
        """Save a sequence that is at a stop. Drops the stops that it has reached or passed."""
        stops = self.stops.pop(sequence, [])
        if sequence.num_computed_tokens in stops:
            self._save(sequence)
        ahead = [stop for stop in stops if stop > sequence.num_computed_tokens]
        if ahead:
            self.stops[sequence] = ahead

    def leave_rungs(self, prefilling: Mapping[Sequence, int]) -> list[StepSave]:
        """Make the rungs that the coming step's prompts pass, if the cache has room. Returns their saves, sorted.

        prefilling: the number of tokens of each prefill row, in order; the rows have their blocks already. No `match`
        may run before the step: it would find snapshots that are not written yet.
        """
        passed = []
        for row, (sequence, num_new) in enumerate(prefilling.items()):
            if sequence in self._uses and self.cache.num_snapshots:
                start = sequence.num_computed_tokens
                end = min(start + num_new, sequence.num_prompt_tokens - 2)  # a stop is before the last token
                passed += [(level, row, sequence, at) for at, level in self.ladder.between(start, end)]
        if not passed:
            return []
        self.cache.next_step()
        snapshots = []
        passed.sort(key=lambda rung: -rung[0])  # if room is scarce, rungs of the highest level, which last longest
        for level, row, sequence, at in passed:
            table = sequence.block_table[: self.blocks.blocks_for(at)].tolist()
            snapshot = self.cache.insert_rung(sequence.known_tokens(at), table, sequence.request.cache_salt, level)
            if snapshot is not None:
                snapshots.append(StepSave(row, at - sequence.num_computed_tokens, snapshot))
        return sorted(snapshots)  # kernels walk a row once, from place to place

    def save_answer(self, sequence: Sequence) -> None:
        """Save a sequence whose answer is complete. A session's answer is saved however few tokens that spares."""
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
        """Empty the ring of the sequence's slot: queue a fold, if tokens wait there."""
        if sequence.num_pending_tokens:
            assert sequence.state_slot is not None
            self._operations.add(Fold(sequence.state_slot, sequence.num_pending_tokens, sequence.num_computed_tokens))
            sequence.num_pending_tokens = 0

    def awaited(self, sequence: Sequence) -> Sequence | None:
        """The running prompt whose snapshot the sequence awaits. None if it awaits none, or if the snapshot's stop is
        past."""
        use = self._uses.get(sequence)
        if use is None or use.waits_for is None or use.awaited_stop not in self.stops.get(use.waits_for, ()):
            return None
        return use.waits_for

    def wait_for(self, sequence: Sequence, match: Match, running: Iterable[Sequence]) -> Sequence | None:
        """Let the sequence wait for a running prompt whose next snapshots spare it at least `min_tokens`. Returns that
        prompt, or None if no prompt of `running` is worth a wait. May add a stop to the prompt."""
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
            use.wanted_stops.add(common)  # too late for the other prompt to save it, so this one will
        return None

    def check_integrity(self, alive: Container[Sequence], running: Container[Sequence]) -> None:
        """Only sequences that are alive are kept, and only running ones have stops. Raises AssertionError."""
        assert all(sequence in alive for sequence in self._uses)
        for sequence, stops in self.stops.items():
            assert sequence in running and stops and stops == sorted(set(stops))
        assert all(use.waits_for is None for sequence, use in self._uses.items() if sequence in running)

    def _next_stop(self, other: Sequence, common: int) -> int:
        """The last stop of a running prompt within its first `common` tokens; 0 if it has none. Adds a stop there."""
        self.add_stop(other, common)
        return max((stop for stop in self.stops.get(other, ()) if stop <= common), default=0)

    def _common(self, sequence: Sequence, other: Sequence) -> int:
        """The number of leading tokens that both prompts share, without the last token of either. 0 if their salts
        differ or `other` does not use the cache."""
        size = min(sequence.num_prompt_tokens, other.num_prompt_tokens) - 1
        if other not in self._uses or sequence.request.cache_salt != other.request.cache_salt:
            return 0
        return common_prefix(sequence.known_tokens(size), other.known_tokens(size))
