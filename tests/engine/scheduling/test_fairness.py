"""Who is computed first: no prompt waits for another because that is long, and none starves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from engines import sequence
from leyden.engine.scheduling.prompt_order import IN_ORDER_EVERY
from leyden.engine.scheduling.scheduler import Scheduler
from leyden.engine.scheduling.waiting import MAX_PASSED
from leyden.engine.sequence import Sequence, Status
from schedulers import deliver, launch, make_scheduler, rows, step

MILLION = 1_000_000
TURN = 1  # steps that a short prompt may lose to the earliest one


def steps_to_first_token(scheduler: Scheduler, each: Sequence, limit: int = 5000) -> int:
    """Add a sequence, and step until it has its first token."""
    scheduler.add(each)
    for num_steps in range(1, limit):
        step(scheduler)
        if each.num_output_tokens:
            return num_steps
    raise AssertionError(f"{each.request_id} had no token after {limit} steps")


def with_long_prompt(*, decoding: bool, length: int = 800, priority: int = 0, after: int = 1) -> Scheduler:
    """So many steps after a long prompt came, beside a decoding sequence or alone."""
    scheduler = make_scheduler(blocks=100, block_size=2048, budget=32, mixed=4)
    if decoding:
        scheduler.add(sequence(2, request_id="decoding", max_tokens=5000, priority=-9))
        step(scheduler)
    scheduler.add(sequence(length, request_id="long", arrival=1, max_tokens=9, priority=priority))
    for _ in range(after):
        step(scheduler)
    return scheduler


@pytest.mark.parametrize("length", [800, 100_000])
@pytest.mark.parametrize("decoding", [True, False], ids=["beside a decoding row", "alone"])
def test_a_short_prompt_does_not_wait_for_a_long_one(decoding, length):
    for after in range(1, 2 * IN_ORDER_EVERY):  # whoever's turn it is
        scheduler = with_long_prompt(decoding=decoding, length=length, after=after)
        assert steps_to_first_token(scheduler, sequence(3, request_id="short", arrival=2)) <= 1 + TURN


def test_of_another_priority_the_lower_number_is_computed_first_whatever_came_first():
    for after in range(1, 2 * IN_ORDER_EVERY):
        scheduler = with_long_prompt(decoding=True, priority=5, after=after)
        assert steps_to_first_token(scheduler, sequence(3, request_id="urgent", arrival=2, priority=-5)) == 1
        scheduler = with_long_prompt(decoding=True, priority=5, after=after)
        urgent = sequence(40, request_id="urgent", arrival=2, priority=-5)
        assert steps_to_first_token(scheduler, urgent) == 10, "it has the whole budget"
        scheduler = with_long_prompt(decoding=True, priority=-5, after=after)
        long = next(s for s in scheduler.running if s.request_id == "long")
        steps_to_first_token(scheduler, sequence(3, request_id="later", arrival=2, priority=5))
        assert long.num_output_tokens, "a short one of lower priority comes after it"


class Traffic:
    """A stream of prompts beside what else the scheduler has, and the steps that each took to its end."""

    def __init__(self, scheduler: Scheduler, arrivals: Iterator[list[int]], max_tokens: int = 1) -> None:
        self.scheduler = scheduler
        self.arrivals = arrivals  # lengths of the prompts that come before each step
        self.max_tokens = max_tokens
        self.num_steps = self.num_sent = 0
        self.waits: list[int] = []
        self._sent_at: dict[Sequence, int] = {}

    def step(self) -> None:
        for length in next(self.arrivals):
            self.num_sent += 1
            name, arrival = f"t{self.num_sent}", 1000 + self.num_sent
            each = sequence([0] * length, request_id=name, arrival=arrival, max_tokens=self.max_tokens)
            self.scheduler.add(each)
            self._sent_at[each] = self.num_steps
        self.num_steps += 1
        for done in deliver(self.scheduler, launch(self.scheduler, self.scheduler.schedule())):
            if done in self._sent_at:
                self.waits.append(self.num_steps - self._sent_at.pop(done))

    @property
    def longest_wait(self) -> int:
        """Of those that wait still, too."""
        return max([*self.waits, *(self.num_steps - sent_at for sent_at in self._sent_at.values())])


def long_one(name: str = "long", arrival: int = 1, length: int = MILLION) -> Sequence:
    return sequence([0] * length, request_id=name, arrival=arrival, max_tokens=1)


def roomy(**settings) -> Scheduler:
    return make_scheduler(**({"blocks": 1000, "block_size": 4096, "slots": 64, "budget": 2048} | settings))


def moderate(seed: int) -> Iterator[list[int]]:
    """Half of what a budget of 2048 can do, in prompts of up to 1,500 tokens."""
    rng = random.Random(seed)
    while True:
        yield [rng.randint(1, 1500)] if rng.random() < 0.65 else []


def test_beside_a_million_tokens_short_prompts_have_their_tokens_within_a_few_steps_and_the_long_one_ends():
    scheduler = roomy()
    traffic = Traffic(scheduler, moderate(1))
    long = long_one()
    scheduler.add(long)
    while long.status is not Status.FINISHED:
        traffic.step()
        assert traffic.num_steps < 2.2 * MILLION / 2048, "it has all that they leave"
    assert len(traffic.waits) > 300
    assert traffic.longest_wait <= 6 and sum(traffic.waits) / len(traffic.waits) < 2
    scheduler.check_integrity()


def test_a_long_prompt_starves_under_no_load():
    """More short prompts than can be computed: the long one advances in one of four steps."""
    scheduler = roomy(max_waiting=10_000)
    traffic = Traffic(scheduler, itertools.repeat([1000, 1000, 1000]))
    long = long_one(length=200_000)
    scheduler.add(long)
    while long.status is not Status.FINISHED:
        traffic.step()
        assert traffic.num_steps <= 4 * (200_000 // 2048 + 1)
    scheduler.check_integrity()


def test_long_prompts_that_wait_are_admitted_however_many_short_ones_come():
    scheduler = roomy(max_waiting=10_000)
    traffic = Traffic(scheduler, itertools.repeat([600, 600]))
    longs = [long_one(f"long {i}", arrival=i, length=50_000) for i in range(5)]
    for each in longs:
        scheduler.add(each)
    started = {}
    while len(started) < len(longs):
        traffic.step()
        assert traffic.num_steps < 2000, "a long one is never admitted"
        started |= {s: traffic.num_sent for s in longs if s not in started and s.status is Status.RUNNING}
    assert all(scheduler.waiting.num_passed(s) <= MAX_PASSED for s in scheduler.waiting)
    between = [after - before for before, after in itertools.pairwise(started.values())]
    assert max(between) <= 2 * MAX_PASSED, "short ones that came meanwhile"
    assert traffic.longest_wait <= 4


def test_one_that_waits_for_blocks_keeps_none_waiting_for_which_it_has_no_use():
    """Two long prompts that do not fit beside each other, and short ones that fit beside either."""
    scheduler = roomy(blocks=300, block_size=64, budget=512)
    traffic = Traffic(scheduler, itertools.cycle([[200], []]))
    longs = [long_one(f"long {i}", arrival=i, length=15_000) for i in range(2)]
    for each in longs:
        scheduler.add(each)
    while longs[0].status is not Status.FINISHED:
        traffic.step()
        assert longs[1].status is Status.WAITING
    assert traffic.longest_wait <= 1 + TURN
    traffic.step()
    assert longs[1].status is Status.RUNNING, "the short ones have left it the room that it needs"
    while longs[1].status is not Status.FINISHED:
        traffic.step()
    assert scheduler.num_preemptions == 0


def test_prompts_that_wait_for_blocks_are_looked_up_again(monkeypatch):
    scheduler = roomy(blocks=100, block_size=64, budget=8192, snapshots=8)
    looked_up, match = [], scheduler.cache.match
    monkeypatch.setattr(scheduler.cache, "match", lambda *known: looked_up.append(known) or match(*known))
    for number, num_tokens in enumerate((50, 90)):
        prompt = [number] * 64 * 30
        scheduler.add(
            sequence(prompt, request_id=f"r{number}", arrival=number, max_tokens=num_tokens, prefix_cache=True)
        )
    step(scheduler)
    step(scheduler)  # their prompts' snapshots are made
    for number in range(20):
        prompt = [1] * 64 * 30 + [number] * 64 * 45
        scheduler.add(sequence(prompt, request_id=f"w{number}", arrival=9 + number, prefix_cache=True))
    counts = []
    while len(scheduler.running) == 2:
        looked_up.clear()
        step(scheduler)
        counts.append(len(looked_up))
    assert counts[0] > 5 and len(counts) > 30 and not any(counts[1:-2])
    step(scheduler)
    assert scheduler.reuse.num_cached(scheduler.running[-1]) == 64 * 30 - 1


def test_beside_one_that_waits_for_blocks_none_of_lower_priority_starts():
    scheduler = roomy(blocks=100, block_size=64, budget=8192)
    scheduler.add(sequence([0] * 64 * 60, request_id="running", arrival=1, max_tokens=50, ignore_eos=True))
    step(scheduler)
    scheduler.add(long_one("first", arrival=2, length=64 * 60))
    scheduler.add(sequence(9, request_id="lower", arrival=3, priority=1))
    scheduler.add(sequence(99, request_id="same", arrival=4))
    step(scheduler)
    assert [s.request_id for s in scheduler.running] == ["running", "same"]


def test_later_ones_never_hold_the_blocks_that_the_first_waits_for():
    """Short prompts with long answers would always fill more than what the first leaves."""
    scheduler = roomy(blocks=100, block_size=64, budget=512, slots=64, max_waiting=10_000)
    traffic = Traffic(scheduler, itertools.repeat([60]), max_tokens=50)
    for _ in range(50):
        traffic.step()
    first = long_one(length=64 * 90)
    scheduler.add(first)
    while first.status is Status.WAITING:
        traffic.step()
        assert traffic.num_steps <= 50 + MAX_PASSED + 2 * 50, "when those that passed it have ended"


def test_a_short_prompt_is_seen_behind_many_long_ones():
    scheduler = roomy(max_waiting=2000)
    for i in range(1000):
        scheduler.add(long_one(f"long {i}", arrival=i, length=5000))
    step(scheduler)
    assert steps_to_first_token(scheduler, sequence(3, request_id="short", arrival=1000)) <= 1 + TURN


def test_a_short_prompt_is_seen_behind_many_long_ones_while_an_urgent_one_waits_for_another():
    scheduler = roomy(snapshots=8, budget=64, min_tokens=8)
    urgent = {"prefix_cache": True, "priority": -1, "max_tokens": 1}
    scheduler.add(sequence([5] * 100 + [6] * 1000, request_id="under way", arrival=1, **urgent))
    step(scheduler)
    scheduler.add(sequence([5] * 100 + [7] * 4, request_id="waits", arrival=2, **urgent))
    for i in range(20):
        scheduler.add(long_one(f"long {i}", arrival=10 + i, length=5000))
    scheduler.add(sequence(3, request_id="short", arrival=99, max_tokens=1))
    assert rows(step(scheduler))[:2] == [("under way", 36), ("short", 3)]


def test_wait_for_a_long_prompt_ends_with_the_shared_part():
    scheduler = roomy(snapshots=8, budget=16, min_tokens=8)
    long = sequence([5] * 48 + [6] * 20_000, request_id="long", arrival=1, max_tokens=1, prefix_cache=True)
    scheduler.add(long)
    step(scheduler)
    other = sequence([5] * 48 + [7] * 4, request_id="other", arrival=2, max_tokens=1, prefix_cache=True)
    middle = sequence([8] * 160, request_id="middle", arrival=3, max_tokens=1, prefix_cache=True)
    scheduler.add(middle)
    assert steps_to_first_token(scheduler, other) <= 3 + TURN, "two for the beginning, one for the rest"
    assert scheduler.reuse.num_cached_tokens == 48
    assert not middle.num_output_tokens


def test_prompt_does_not_wait_for_one_of_lower_priority():
    scheduler = roomy(snapshots=8, budget=16, min_tokens=8)
    long = sequence([5] * 48 + [6] * 20_000, request_id="long", arrival=1, max_tokens=1, prefix_cache=True, priority=1)
    scheduler.add(long)
    step(scheduler)
    scheduler.add(sequence([9] * 160, request_id="between", arrival=2, max_tokens=1))
    urgent = sequence([5] * 48, request_id="urgent", arrival=3, max_tokens=1, prefix_cache=True)
    assert steps_to_first_token(scheduler, urgent) <= 4 + TURN, "it is saved before its last token"


def test_short_prompts_are_given_whole_and_one_at_most_is_cut():
    """So that a step has few rows: a CUDA graph holds 32 prompts."""
    scheduler = roomy(budget=256)
    for i, length in enumerate((5000, 4000, 90, 80, 70, 60, 3000)):
        scheduler.add(long_one(f"r{length}", arrival=i, length=length))
    assert rows(step(scheduler)) == [("r60", 60), ("r70", 70), ("r80", 80), ("r90", 46)]
    assert rows(step(scheduler)) == [("r90", 44), ("r3000", 212)]


def test_one_that_was_preempted_is_not_passed_over():
    scheduler = make_scheduler(blocks=4, block_size=2, slots=2, budget=16)
    for arrival, name in enumerate(("first", "second")):
        scheduler.add(sequence(3, request_id=name, max_tokens=6, arrival=arrival))
    step(scheduler)
    scheduler.add(sequence(1, request_id="late", max_tokens=1, arrival=9))
    seen: list[str] = []
    while scheduler.has_work:
        seen += [name for name, _ in rows(step(scheduler))]
    assert scheduler.num_preemptions
    assert seen.index("late") > len(seen) - seen[::-1].index("first") - 1
