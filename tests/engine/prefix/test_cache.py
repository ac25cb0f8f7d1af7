"""The prefix cache: a hit is a miss, token for token, and takes what earlier prompts and answers left."""

from __future__ import annotations

import functools
import itertools
import random
from types import SimpleNamespace

import engines
import numpy as np
import pytest
import torch
from backends import BACKENDS
from engines import DEVICE, answer, assert_nothing_held, computed, drain, request, sequence
from leyden.engine.memory.blocks import BlockManager
from leyden.engine.memory.operations import Move
from leyden.engine.prefix.cache import PrefixCache
from leyden.engine.prefix.ladder import Ladder
from leyden.engine.prefix.radix_tree import common_prefix, path_to
from tiny_models import random_prompt

make_core = functools.partial(engines.make_core, device=DEVICE, snapshot_min_tokens=1)


def tokens(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], dtype=np.int32)


class Book:
    """A cache, and sequences that leave texts in it."""

    def __init__(self, *, blocks=100, block_size=4, **kwargs) -> None:
        self.blocks = BlockManager(blocks, block_size)
        self.cache = PrefixCache(self.blocks, **kwargs)

    def leave(self, text: str, salt: str | None = None) -> tuple[int | None, list[Move]]:
        writer = sequence(len(text))
        self.blocks.grow(writer, len(text))
        found = self.cache.insert(tokens(text), writer.block_table.tolist(), salt)
        self.blocks.release(writer)
        self.check()
        return found

    def leave_rungs(self, text: str, *ends_and_levels: tuple[int, int]) -> list[int | None]:
        """As in one step."""
        writer = sequence(len(text))
        self.blocks.grow(writer, len(text))
        self.cache.next_step()
        table = writer.block_table.tolist()
        made = [self.cache.insert_rung(tokens(text[:end]), table, None, level) for end, level in ends_and_levels]
        self.blocks.release(writer)
        self.check()
        return made

    def kept(self, *, rungs: bool) -> dict[str, int]:
        """The texts that have a snapshot, and which."""
        nodes = [n for n in self.cache.tree.nodes if n.snapshot is not None and (n.rung is not None) is rungs]
        return {"".join(chr(t) for part in path_to(n) for t in part.tokens): n.snapshot for n in nodes}

    def find(self, text: str, salt: str | None = None) -> tuple[int, int]:
        match = self.cache.match(tokens(text), salt)
        return match.num_cached, match.num_shared

    def check(self) -> None:
        self.cache.check_integrity()
        self.blocks.check_integrity([], self.cache.tables())


# -- the tree -------------------------------------------------------------------------------------------------


def test_the_deepest_snapshot_on_the_path_is_found_and_how_far_the_path_goes():
    book = Book(num_snapshots=9)
    book.leave("the cat sat")
    book.leave("the cat sat on the mat")
    book.leave("the dog")
    assert book.find("the cat sat on the hat") == (11, 19)
    assert book.find("the cat sat on the mat, again") == (22, 22)
    assert book.find("the cow") == (0, 5)
    assert book.find("a dog") == (0, 0)
    assert book.find("the dog") == (7, 7)


def test_a_split_point_can_become_a_snapshot_and_is_left_again():
    book = Book(num_snapshots=9)
    book.leave("abcdefgh")
    book.leave("abcdexyz")
    assert book.find("abcde") == (0, 5)
    assert book.leave("abcde")[0] is not None
    assert book.find("abcdef") == (5, 6)
    assert book.leave("abcde") == (None, []), "it is there"


def test_salts_do_not_share():
    book = Book(num_snapshots=9)
    book.leave("secret", salt="a")
    assert book.find("secret") == book.find("secret", salt="b") == (0, 0)
    assert book.find("secret", salt="a") == (6, 6)


def test_the_least_recently_used_state_goes_first():
    book = Book(num_snapshots=2)
    book.leave("aaaa")
    book.leave("bbbb")
    match = book.cache.match(tokens("aaaa"))
    assert match.node is not None
    book.cache.use(match.node)
    book.leave("cccc")
    assert [book.find(text)[0] for text in ("aaaa", "bbbb", "cccc")] == [4, 0, 4]
    assert book.blocks.num_cached == 2, "keys and values without a state are of no use"


def test_the_least_recently_used_blocks_go_first():
    book = Book(blocks=3, num_snapshots=9)
    for text in ("aaaa", "bbbb", "cccc"):
        book.leave(text)
    book.cache.use(book.cache.match(tokens("aaaa")).node)
    book.find("bbbb")  # a look is no use
    assert book.cache.make_room(1)
    assert [book.find(text)[0] for text in ("aaaa", "bbbb", "cccc")] == [4, 0, 4]


@pytest.mark.parametrize("seed", range(6))
def test_texts_are_forgotten_in_the_order_of_their_last_use_by_the_block_and_by_the_state(seed):
    """Against lists: of all texts for blocks, of those on the device and on the host for snapshots."""
    rng = random.Random(seed)
    sizes = {"num_snapshots": rng.choice([4, 9]), "num_host_snapshots": rng.choice([0, 3])}
    book = Book(blocks=20, **sizes)
    every: list[str] = []
    tiers: list[list[str]] = [[], []]
    for i in range(200):
        text = rng.choice(every) if every and rng.random() < 0.5 else chr(1000 + i) * rng.randint(1, 12)
        needed = book.blocks.blocks_for(len(text))
        if text in every:
            node = book.cache.match(tokens(text)).node
            if rng.random() < 0.5:
                book.cache.use(node)
            else:
                book.cache.let_go(book.cache.lease(node, 1)[2])
            for order in (every, *tiers):
                if text in order:
                    order.append(order.pop(order.index(text)))
            continue
        while sum(book.blocks.blocks_for(len(kept)) for kept in every) + needed > 20:
            gone = every.pop(0)
            tiers = [[kept for kept in tier if kept != gone] for tier in tiers]
        assert book.cache.make_room(needed)
        book.leave(text)
        every.append(text)
        tiers[0].append(text)
        for tier, size in zip((0, 1), sizes.values(), strict=True):
            if len(tiers[tier]) > size:
                gone = tiers[tier].pop(0)
                (every.remove if tier or not sizes["num_host_snapshots"] else tiers[1].append)(gone)
        assert set(book.kept(rungs=False)) == set(every)
        on_host = {text for text, place in book.kept(rungs=False).items() if place >= sizes["num_snapshots"]}
        assert on_host == set(tiers[1])


def test_a_state_on_the_way_to_another_leaves_its_keys_and_values():
    book = Book(num_snapshots=2, block_size=4)
    book.leave("aaaa")
    book.leave("aaaabbbb")
    book.leave("cccc")
    assert book.find("aaaabbbb")[0] == 8 and book.find("aaaa") == (0, 4)
    assert book.blocks.num_cached == 3


def test_states_move_to_the_host_and_are_found_there():
    book = Book(num_snapshots=1, num_host_snapshots=2)
    assert book.leave("aaaa") == (0, [])
    assert book.leave("bbbb") == (0, [Move(0, 1)])
    assert book.leave("cccc") == (0, [Move(0, 2)])
    assert [book.find(text)[0] for text in ("aaaa", "bbbb", "cccc")] == [4, 4, 4]
    assert book.leave("dddd") == (0, [Move(0, 1)])
    assert [book.find(text)[0] for text in ("aaaa", "bbbb", "cccc", "dddd")] == [0, 4, 4, 4]


def test_a_snapshot_must_spare_enough():
    book = Book(num_snapshots=9, min_tokens=5)
    assert book.leave("abcd")[0] is None
    assert book.leave("abcde")[0] is not None
    assert book.leave("abcdefgh")[0] is None
    assert book.leave("abcdefghij")[0] is not None


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("seed", range(6))
def test_random_trees_stay_whole_and_know_their_entries(block_size, seed):
    rng = random.Random(seed)
    book = Book(blocks=60, block_size=block_size, num_snapshots=rng.choice([1, 4, 30]), num_host_snapshots=seed % 3)
    left: set[str] = set()
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(1, 14)))
        if book.cache.make_room(book.blocks.blocks_for(len(text))):
            book.leave(text)
            left.add(text)
        cached, shared = book.find(text)
        assert cached <= shared <= len(text) and (cached == 0 or text[:cached] in left)
        if rng.random() < 0.1:
            assert book.cache.make_room(rng.randint(0, 60))
        book.check()
    book.cache.clear()
    book.check()
    assert book.blocks.num_free == 60 and book.cache.num_snapshots_used == 0


def test_leased_blocks_are_not_given_away():
    book = Book(blocks=4, num_snapshots=1, num_host_snapshots=1)
    book.leave("aaaa")
    found, ends, lease = book.cache.lease(book.cache.match(tokens("aaaa")).node, 2)
    assert (found.tolist(), ends, lease.snapshots) == (tokens("aaaa").tolist(), [4], [0])
    assert book.leave("bbbb") == (None, []), "the only snapshot is held"
    assert book.cache.make_room(3) and not book.cache.make_room(4)
    book.check()
    assert book.find("aaaa") == (4, 4) and book.blocks.num_free == 3, "it is not forgotten where that frees nothing"
    book.cache.clear()
    assert book.find("aaaa") == (0, 0) and book.blocks.num_free == 3, "it is there until it is let go"
    book.cache.let_go(lease)
    assert book.blocks.num_free == 4 and book.leave("cccc") == (0, [])


def test_released_leases_count_as_used_last():
    book = Book(num_snapshots=2)
    book.leave("aaaa")
    book.leave("bbbb")
    book.cache.let_go(book.cache.lease(book.cache.match(tokens("aaaa")).node, 1)[2])
    book.leave("cccc")
    assert set(book.kept(rungs=False)) == {"aaaa", "cccc"}


def test_a_rung_where_an_adopted_text_ends_becomes_a_snapshot_like_others():
    book = Book(num_snapshots=4)
    lease, _ = book.cache.take(1, 1)
    book.leave_rungs("abcd", (4, 0))
    book.cache.adopt(lease, tokens("abcd"), [4])
    assert set(book.kept(rungs=False)) == {"abcd"} and not book.kept(rungs=True)
    book.check()


def test_taken_blocks_enter_the_tree_at_free_places():
    book = Book(num_snapshots=4)
    book.leave("the cat")
    lease, moves = book.cache.take(book.blocks.blocks_for(22), 2)
    assert lease is not None and not moves and book.find("the cat sat on the mat") == (7, 7)
    book.leave("the cat sat")  # somebody computes it meanwhile
    node = book.cache.adopt(lease, tokens("the cat sat on the mat"), [11, 22])
    book.check()
    assert node.end == 22 and book.find("the cat sat on the mat") == (22, 22)
    assert book.cache.num_snapshots_used == 3, "the snapshot in the way is free again"
    assert book.blocks.num_cached == 2 + 2 + 4, "of the blocks those that end in a node of their own are kept"


def test_request_that_never_fits_evicts_nothing():
    book = Book(blocks=4, num_snapshots=4)
    book.leave("aaaa")
    runner = sequence(8)
    book.blocks.grow(runner, 8)
    assert book.cache.take(3, 1) == (None, []) and book.find("aaaa") == (4, 4)
    assert Book(num_snapshots=0).cache.take(1, 1) == (None, [])


@pytest.mark.parametrize("seed", range(8))
def test_random_holds_leave_the_tree_whole(seed):
    rng = random.Random(seed)
    device, host = rng.choice([1, 3, 20]), rng.choice([0, 2])
    book = Book(blocks=40, block_size=rng.choice([1, 4]), num_snapshots=device, num_host_snapshots=host)
    leases: list = []
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(1, 14)))
        match = book.cache.match(tokens(text))
        if rng.random() < 0.2 and match.node is not None:
            leases.append((book.cache.lease(match.node, rng.randint(1, 2))[2], None))
        elif rng.random() < 0.2:
            lease, _ = book.cache.take(book.blocks.blocks_for(len(text)), rng.randint(1, 2))
            if lease is not None:
                assert all(node.snapshot not in lease.snapshots for node in book.cache.tree.nodes)
                leases.append((lease, text))
        elif rng.random() < 0.5 and leases:
            lease, text = leases.pop(rng.randrange(len(leases)))
            ends = [len(text) // 2, len(text)][-len(lease.snapshots) :] if text else []
            if text and 0 not in ends and rng.random() < 0.7:
                book.cache.adopt(lease, tokens(text), ends)
                assert book.find(text)[0] == len(text)
            else:
                book.cache.let_go(lease)
        elif book.cache.make_room(book.blocks.blocks_for(len(text))):
            snapshot, moves = book.leave(text)
            held = {each for lease, _ in leases for each in lease.snapshots}
            assert snapshot not in held and not held & {place for move in moves for place in move}
        book.check()
    for lease, _ in leases:
        book.cache.let_go(lease)
    book.cache.clear()
    book.check()
    assert book.blocks.num_free == 40 and book.cache.num_snapshots_used == book.cache.num_host_snapshots_used == 0


# -- rungs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_rung_takes_no_other_snapshots_place_and_gives_up_its_own(seed):
    rng = random.Random(seed)
    book = Book(blocks=4000, block_size=rng.choice([1, 4]), num_snapshots=rng.choice([4, 5, 16]))
    cache = book.cache
    cache.num_for_rungs = rng.choice([0, cache.num_snapshots // 4])
    most, leases, num_made = cache.num_snapshots - cache.num_for_rungs, [], 0
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(1, 14)))
        before, rungs = book.kept(rungs=False), book.kept(rungs=True)
        match = cache.match(tokens(text))
        if rng.random() < 0.1 and match.node is not None:
            leases.append(cache.lease(match.node, 2)[2])
        elif rng.random() < 0.1 and leases:
            cache.let_go(leases.pop())
        elif rng.random() < 0.5:
            made = book.leave_rungs(text, *((end, rng.randint(0, 3)) for end in range(1, len(text) + 1, 3)))
            assert book.kept(rungs=False) == before, "nothing better is forgotten, nor moved"
            written = [snapshot for snapshot in made if snapshot is not None]
            num_made += len(written)
            assert len(set(written)) == len(written), "a step writes to each place once"
            assert set(written) <= set(book.kept(rungs=True).values())
            held = {snapshot for lease in leases for snapshot in lease.snapshots}
            assert not held & set(written)
        else:
            place, _ = book.leave(text)
            forgotten = before.keys() - book.kept(rungs=False).keys()
            taken = rungs.keys() - book.kept(rungs=True).keys()
            if not leases and place is not None:
                assert len(book.kept(rungs=False)) <= most
                assert not forgotten or len(before) >= most, "a place that was free, or a rung's, would have done"
                assert not taken or len(rungs) > cache.num_for_rungs, "their own places are left to them"
        book.check()
    assert num_made > 3 or not cache.num_for_rungs


def test_a_rung_is_no_reason_to_leave_out_a_better_snapshot():
    book = Book(num_snapshots=9, min_tokens=4)
    book.leave_rungs("the cat sat", (8, 0))
    assert book.leave("the cat sat")[0] is not None, "3 tokens further, but the rung is soon forgotten"
    book.leave_rungs("the dog", (6, 0))
    assert book.leave("the do") == (None, []), "its state is there"
    assert set(book.kept(rungs=True)) == {"the cat "} and set(book.kept(rungs=False)) == {"the cat sat", "the do"}
    assert book.leave_rungs("the do", (6, 0)) == [None]


def test_rungs_do_not_move_to_the_host():
    book = Book(num_snapshots=2, num_host_snapshots=4)
    book.leave_rungs("aaaa", (2, 0), (4, 1))
    assert book.leave("bbbb")[1] == book.leave("cccc")[1] == [], "two rungs are forgotten for them"
    assert book.find("aaaa") == (0, 0) and book.leave("dddd")[1] != []


def test_older_prompts_keep_every_other_rung_and_then_every_fourth():
    book = Book(blocks=10_000, num_snapshots=32)
    ladder = [(10 * i, level) for i, (_, level) in enumerate(Ladder(1, 1).between(0, 8), start=1)]
    for name in "abcdefghijkl":
        book.leave_rungs(name * 80, *ladder)
    left = {name: {len(text) for text in book.kept(rungs=True) if text[0] == name} for name in "abcdefghijkl"}
    assert left["l"] == {end for end, _ in ladder}, "the youngest has all"
    assert sum(map(len, left.values())) == 32
    for older, younger in itertools.pairwise(left.values()):
        assert older <= younger
    assert {frozenset(ends) for ends in left.values()} == {
        frozenset(range(step, 90, step)) for step in (10, 20, 40, 80)
    }, "of each every second, fourth or eighth is left"


def test_a_rung_that_is_used_is_young_again():
    book = Book(num_snapshots=2)
    book.leave_rungs("aaaa", (4, 0))
    book.leave_rungs("bbbb", (4, 0))
    book.cache.use(book.cache.match(tokens("aaaa")).node)
    book.leave_rungs("cccc", (4, 0))
    assert set(book.kept(rungs=True)) == {"aaaa", "cccc"}


def test_common_prefixes():
    pairs = [("", ""), ("a", ""), ("abc", "abd"), ("abc", "abc"), ("abc", "abcd"), ("xbc", "abc")]
    assert [common_prefix(tokens(a), tokens(b)) for a, b in pairs] == [0, 0, 2, 3, 3, 0]


# -- the engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize("length", [2, 16, 37, 100])
def test_the_same_prompt_again_computes_one_token_of_it(tiny, backend, lags, length):
    core = make_core(tiny.folder, linear_backend=backend, async_scheduling=lags)
    prompt = random_prompt(length, seed=length)
    first = answer(core, prompt, max_tokens=12)
    counts = computed(core)
    assert answer(core, prompt, max_tokens=12).token_ids == first.token_ids
    assert sum(counts) == 12
    assert core.stats().prefix_cache_hits_total == length - 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
def test_a_conversation_computes_each_turn_alone(tiny, backend, lags):
    cached = make_core(tiny.folder, linear_backend=backend, async_scheduling=lags)
    plain = make_core(tiny.folder, linear_backend=backend, prefix_cache=False)
    prompt = random_prompt(40, seed=1)
    for turn in range(4):
        counts = computed(cached)
        found = answer(cached, prompt, max_tokens=20)
        assert found.token_ids == answer(plain, prompt, max_tokens=20).token_ids
        # The last token of the answer before was never fed.
        assert sum(counts) == (40 if turn == 0 else 1 + 7) + 19
        prompt = prompt + found.token_ids + random_prompt(7, seed=turn)


@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
def test_stop_token_that_was_fed_is_kept(tiny, lags):
    core = make_core(tiny.folder, async_scheduling=lags)
    prompt = random_prompt(20, seed=2)
    ids = answer(core, prompt, max_tokens=10, prefix_cache=False).token_ids
    stopped = answer(core, prompt, max_tokens=10, stop_token_ids=[ids[5]])
    more = [*prompt, *stopped.token_ids, *random_prompt(5, seed=3)]
    plain = make_core(tiny.folder, prefix_cache=False)
    before = core.stats().prefix_cache_hits_total
    assert answer(core, more, max_tokens=8).token_ids == answer(plain, more, max_tokens=8).token_ids
    assert core.stats().prefix_cache_hits_total - before == 20 + len(stopped.token_ids) - (not lags)


def test_prompts_that_share_a_beginning_compute_it_once(tiny):
    core = make_core(tiny.folder, max_num_seqs=8)
    plain = make_core(tiny.folder, max_num_seqs=8, prefix_cache=False)
    system = random_prompt(64, seed=4)
    prompts = [system + random_prompt(9, seed=10 + i) for i in range(8)]
    counts = computed(core)
    together = drain(core, *(request(str(i), prompt, max_tokens=4) for i, prompt in enumerate(prompts)))
    for i, prompt in enumerate(prompts):
        assert together[str(i)].token_ids == answer(plain, prompt, max_tokens=4).token_ids
    assert sum(counts) == 64 + 8 * (9 + 3), "the first leaves what the others wait for"


def test_one_that_comes_later_takes_the_point_where_two_part(tiny):
    core = make_core(tiny.folder, snapshot_interval=0)
    system = random_prompt(50, seed=5)
    hits = []
    for i in range(3):
        before = core.stats().prefix_cache_hits_total
        answer(core, system + random_prompt(20, seed=20 + i), max_tokens=2)
        hits.append(core.stats().prefix_cache_hits_total - before)
    assert hits == [0, 0, 50]


def test_a_beginning_that_is_told_is_kept_for_the_next(tiny):
    core = make_core(tiny.folder, snapshot_min_tokens=16)
    system = random_prompt(50, seed=5)
    hits = []
    for i in range(2):
        before = core.stats().prefix_cache_hits_total
        drain(core, request(str(i), system + random_prompt(9, seed=20 + i), beginning=50, max_tokens=2))
        hits.append(core.stats().prefix_cache_hits_total - before)
    assert hits == [0, 50], "nearer to the prompt's end than two snapshots may be, this is the one to keep"


def test_an_answers_end_is_kept_sooner_than_a_place_that_costs_a_step(tiny):
    core = make_core(tiny.folder, snapshot_min_tokens=128, async_scheduling=False)
    prompt = random_prompt(8, seed=3)
    answer(core, prompt, max_tokens=5)
    assert core.stats().snapshots_used == 0
    said = answer(core, prompt, max_tokens=30).token_ids
    assert core.stats().snapshots_used == 1
    before = core.stats().prefix_cache_hits_total
    answer(core, prompt + said + [1, 2], max_tokens=2)
    assert core.stats().prefix_cache_hits_total - before == 8 + 29


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lags", "chunk"), [(True, 7), (False, 64), (True, 512)])
def test_a_prompt_that_parts_on_the_way_of_another_answers_as_without_a_cache(tiny, backend, lags, chunk):
    settings = {"linear_backend": backend, "async_scheduling": lags, "snapshot_min_tokens": 8}
    core = make_core(tiny.folder, max_num_batched_tokens=chunk, **settings)
    plain = make_core(tiny.folder, prefix_cache=False, linear_backend=backend)
    prompt = random_prompt(100, seed=6)
    answer(core, prompt, max_tokens=2)
    for shared, found in [(99, 98), (70, 56), (31, 24)]:  # rungs: 24, 32, 42, 56, 74, 98
        other = prompt[:shared] + random_prompt(20, seed=shared)
        before = core.stats().prefix_cache_hits_total
        assert answer(core, other, max_tokens=12).token_ids == answer(plain, other, max_tokens=12).token_ids
        assert core.stats().prefix_cache_hits_total - before >= found


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_on_the_way_is_that_of_a_prompt_that_ends_there(tiny, backend):
    core = make_core(tiny.folder, linear_backend=backend, snapshot_min_tokens=8, max_num_batched_tokens=41)
    prompt = random_prompt(100, seed=6)
    answer(core, prompt, max_tokens=2)
    rungs = [node for node in core.scheduler.cache.tree.nodes if node.rung is not None]
    assert sorted(node.end for node in rungs) == [24, 32, 42, 56, 74, 98]
    for node in rungs:
        alone = make_core(tiny.folder, linear_backend=backend, prefix_cache=False)
        answer(alone, prompt[: node.end], max_tokens=1)  # the last token drawn is not fed
        kept = core.runner.pools.snapshots[node.snapshot]
        for part, expected in zip(kept, alone.runner.pools.states.slot(0), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)


def test_request_without_the_cache_takes_and_leaves_nothing(tiny):
    core = make_core(tiny.folder)
    prompt = random_prompt(30, seed=8)
    answer(core, prompt, max_tokens=4, prefix_cache=False)
    assert core.stats().snapshots_used == core.stats().kv_blocks_cached == 0
    answer(core, prompt, max_tokens=4)
    counts = computed(core)
    answer(core, prompt, max_tokens=4, prefix_cache=False)
    assert sum(counts) == 33 and core.stats().prefix_cache_queries_total == 30


def test_salts_part_tenants(tiny):
    core = make_core(tiny.folder)
    prompt = random_prompt(30, seed=8)
    cached = []
    for salt in ("a", "b", None, "a"):
        before = core.stats().prefix_cache_hits_total
        answer(core, prompt, max_tokens=4, cache_salt=salt)
        cached.append(core.stats().prefix_cache_hits_total - before)
    assert cached == [0, 0, 0, 29]


def test_scores_of_a_prompt_are_computed(tiny):
    core = make_core(tiny.folder)
    prompt = random_prompt(30, seed=9)
    answer(core, prompt, max_tokens=4)
    scored = answer(core, prompt, max_tokens=1, prompt_logprobs=1)
    assert scored.prompt_logprobs is not None and len(scored.prompt_logprobs) == 30


def test_penalties_count_cached_tokens(tiny):
    core = make_core(tiny.folder)
    plain = make_core(tiny.folder, prefix_cache=False)
    prompt = random_prompt(30, seed=9)
    params = {"max_tokens": 12, "repetition_penalty": 1.5, "frequency_penalty": 0.5}
    expected = answer(plain, prompt, **params).token_ids
    assert [answer(core, prompt, **params).token_ids for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize("seed", range(3))
def test_random_conversations_under_pressure_answer_as_without_a_cache(tiny, backend, lags, seed):
    """Small pools, chunks, preemption, aborts, few snapshots, some of them on the host."""
    rng = random.Random(seed)
    settings = {"linear_backend": backend, "max_num_seqs": 3, "block_size": rng.choice([4, 16]), "max_model_len": 128}
    chunks = {"max_num_batched_tokens": rng.choice([8, 64]), "mixed_prefill_tokens": rng.choice([3, 64])}
    cached = make_core(
        tiny.folder,
        async_scheduling=lags,
        num_kv_blocks=200 // settings["block_size"],
        snapshots=rng.choice([2, 5]),
        host_snapshot_gb=rng.choice([0.0, 0.001]),
        snapshot_interval=rng.choice([16, 4096]),
        **settings,
        **chunks,
    )
    plain = make_core(tiny.folder, prefix_cache=False, **settings)
    conversations = [random_prompt(rng.randint(1, 30), seed=i % 2) for i in range(6)]
    for round_ in range(4):
        asked = [request(f"{i}", prompt, max_tokens=rng.randint(1, 12)) for i, prompt in enumerate(conversations)]
        victim = request("victim", rng.choice(conversations), max_tokens=12)
        cached.add_request(victim)
        answers = {each.request_id: None for each in asked}
        for _ in range(rng.randint(0, 4)):
            cached.step()
        cached.abort_request("victim")
        answers = drain(cached, *asked)
        for i, each in enumerate(asked):
            alone = answer(plain, conversations[i], max_tokens=each.sampling_params.max_tokens)
            assert answers[f"{i}"].token_ids == alone.token_ids, (round_, i)
            conversations[i] = (conversations[i] + alone.token_ids + random_prompt(3, seed=round_))[:100]
    assert cached.stats().prefix_cache_hits_total > 0


def test_half_precision_takes_half_the_memory(tiny):
    whole = make_core(tiny.folder, snapshots=4)
    half = make_core(tiny.folder, snapshots=4, snapshot_dtype="bfloat16")
    assert half.info.memory.snapshots * 2 == whole.info.memory.snapshots
    prompt = random_prompt(30, seed=9)
    answer(half, prompt, max_tokens=2)
    answer(half, prompt, max_tokens=2)
    assert half.stats().prefix_cache_hits_total == 29
    (saved,) = half.runner.pools.snapshots[0]
    assert saved.dtype == torch.bfloat16
    assert torch.isfinite(saved).all() and saved.any()


def test_an_error_leaves_nothing_in_the_cache(tiny, monkeypatch):
    core = make_core(tiny.folder, async_scheduling=False, cuda_graphs=False)
    broken = SimpleNamespace(sample=lambda logits, *_: logits.new_full((len(logits),), -1).int())
    monkeypatch.setattr(core.runner.sampler, "kernels", broken)
    failed = answer(core, random_prompt(1, seed=1), max_tokens=4)
    assert failed.finish_reason == "error"
    assert_nothing_held(core)
    assert core.stats().snapshots_used == 0
