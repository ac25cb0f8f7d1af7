"""Sessions: what is saved comes back in another engine of the same model, whole or not at all."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import stat
import struct
import time
from pathlib import Path

import engines
import numpy as np
import pytest
from backends import BACKENDS
from engines import DEVICE, answer, assert_nothing_held, computed, drain, request
from leyden.engine.boundary.in_process import InProcessClient
from leyden.engine.boundary.process_client import ProcessClient
from leyden.engine.core import EngineCore
from leyden.engine.errors import ConfigError, EngineDeadError, RequestError, SessionError
from leyden.engine.memory import plan as memory
from leyden.engine.messages import SessionCall, SessionDone
from leyden.engine.prefix import conversations
from leyden.engine.sessions import calls as sessions
from leyden.engine.sessions import carrier as session_copies
from leyden.engine.sessions import folder as session_folder
from leyden.engine.sessions import format as session_format
from leyden.engine.sessions.format import checksum
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import random_prompt, save_minimax

DEADLINE = 20.0
PROMPT = random_prompt(45, seed=1)
MORE = random_prompt(7, seed=2)


@pytest.fixture
def make_core(tiny, tmp_path):
    """An engine whose sessions are in the folder of this test."""
    return functools.partial(engines.make_core, tiny.folder, device=DEVICE, session_folder=tmp_path / "saved")


def call(core: EngineCore, action: str, session_id: str = "a") -> SessionDone:
    """The answer to one call."""
    core.sessions.add(SessionCall("1", action, session_id))
    deadline = time.monotonic() + DEADLINE
    while True:
        for done in core.sessions.advance():
            assert not core.sessions.is_busy
            core.check_integrity()
            return done
        assert time.monotonic() < deadline, "the call does not come to an end"
        time.sleep(0.001)


def done(core: EngineCore, action: str, session_id: str = "a") -> SessionDone:
    found = call(core, action, session_id)
    assert found.error_code is None, found.error
    return found


def refused(core: EngineCore, action: str, code: str, *words: str, session_id: str = "a") -> None:
    found = call(core, action, session_id)
    assert found.error_code == code, found
    for word in words:
        assert word in found.error


def talk(core: EngineCore, prompt=PROMPT, **fields) -> list[int]:
    """A turn under the id "a": the conversation with its answer."""
    answers = drain(core, request("alone", prompt, **({"max_tokens": 12, "session_id": "a"} | fields)))
    return prompt + answers["alone"].token_ids


def saved(core: EngineCore, **fields) -> list[int]:
    """The same, in a file."""
    conversation = talk(core, **fields)
    done(core, "save")
    return conversation


def path_of(core: EngineCore, session_id: str = "a") -> Path:
    return core.sessions.folder / f"{session_id}.safetensors"


def nothing_taken(core: EngineCore) -> None:
    assert_nothing_held(core)
    assert core.stats().kv_blocks_cached == core.stats().snapshots_used == 0


# -- what comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lags", [False, True], ids=["at once", "a step behind"])
@pytest.mark.parametrize("num_tokens", [2, 12, 35])
def test_the_next_turn_after_a_restart_computes_its_new_tokens_alone(make_core, backend, lags, num_tokens):
    settings = {"linear_backend": backend, "async_scheduling": lags}
    core = make_core(**settings)
    conversation = saved(core, max_tokens=num_tokens)
    num_known = len(conversation) - 1  # the last token of an answer is not fed
    again = make_core(**settings)
    assert done(again, "restore").num_tokens == num_known
    counts = computed(again)
    params = {"max_tokens": 9, "frequency_penalty": 0.5, "temperature": 1.0, "seed": 3}
    plain = make_core(session_folder=None, prefix_cache=False, **settings)
    expected = answer(plain, conversation + MORE, **params).token_ids
    assert answer(again, conversation + MORE, **params).token_ids == expected
    assert sum(counts) == 1 + len(MORE) + 8
    assert again.stats().prefix_cache_hits_total == num_known


def test_restored_session_is_the_saved_one_bit_for_bit(make_core, tmp_path):
    core = make_core()
    saved(core)
    first = path_of(core).read_bytes()
    again = make_core(block_size=3)
    done(again, "restore")
    done(again, "save")
    assert path_of(again).read_bytes() == first


def test_a_turn_whose_template_leaves_the_answer_out_goes_on_from_its_prompt(make_core):
    """The state before the answer is saved too."""
    core = make_core(snapshot_min_tokens=8)
    saved(core)
    again = make_core()
    done(again, "restore")
    answer(again, PROMPT[:-1] + MORE, max_tokens=2)
    assert again.stats().prefix_cache_hits_total == len(PROMPT) - 1


def test_states_on_the_host_are_saved_too(make_core):
    settings = {"snapshots": 1, "host_snapshot_gb": 0.001, "snapshot_min_tokens": 8}
    core = make_core(**settings)
    conversation = talk(core)
    talk(core, random_prompt(30, seed=5), session_id=None)
    assert core.scheduler.reuse.conversations.find("a").node.snapshot > 0
    done(core, "save")
    again = make_core(**settings)
    talk(again, random_prompt(30, seed=5), session_id=None)  # whose state has to make room
    done(again, "restore")
    plain = make_core(session_folder=None, prefix_cache=False)
    assert answer(again, conversation + MORE, max_tokens=8).token_ids == (
        answer(plain, conversation + MORE, max_tokens=8).token_ids
    )
    assert again.stats().prefix_cache_hits_total >= len(conversation) - 1


def test_salts_part_tenants_after_a_restart_too(make_core):
    core = make_core()
    conversation = saved(core, cache_salt="secret")
    again = make_core()
    done(again, "restore")
    hits = []
    for salt in (None, "other", "secret"):
        before = again.stats().prefix_cache_hits_total
        answer(again, conversation + MORE, max_tokens=2, cache_salt=salt)
        hits.append(again.stats().prefix_cache_hits_total - before > 0)
    assert hits == [False, False, True]


def test_session_id_stands_for_the_latest_turn(make_core):
    core = make_core()
    first = saved(core)
    second = saved(core, prompt=first + MORE)
    again = make_core()
    assert done(again, "restore").num_tokens >= len(second) - 1


def test_an_answer_that_its_client_cuts_short_is_kept_as_far_as_it_was_computed(make_core):
    """So do stop strings end."""
    core = make_core()
    core.add_request(request("cut", PROMPT, max_tokens=100, session_id="a"))
    for _ in range(9):
        core.step()
    core.abort_request("cut")
    drain(core)
    assert len(PROMPT) < done(core, "save").num_tokens < len(PROMPT) + 9
    core.add_request(request("early", random_prompt(100, seed=8), max_tokens=100, session_id="b"))
    core.step()
    core.abort_request("early")
    drain(core)
    refused(core, "save", "session_not_found", "'b'", session_id="b")


def test_cached_blocks_of_a_session_are_not_read_again(make_core, monkeypatch):
    core = make_core()
    saved(core)
    monkeypatch.setattr(session_copies.Carrier, "load", None)
    before = core.stats()
    done(core, "restore")
    assert core.stats() == before


def test_a_beginning_that_is_in_the_cache_is_shared(make_core):
    core = make_core()
    saved(core)
    again = make_core(snapshot_min_tokens=8)
    answer(again, PROMPT, max_tokens=2)
    before = again.stats().kv_blocks_cached
    done(again, "restore")
    assert again.stats().kv_blocks_cached - before <= 2


def test_others_go_on_while_a_session_is_saved_and_restored(make_core, monkeypatch):
    """Both stop half-way until the others have their answers, which are those that they get alone."""
    core, plain = (
        make_core(num_kv_blocks=20, snapshot_min_tokens=1),
        make_core(session_folder=None, prefix_cache=False),
    )
    conversation = talk(core)
    gate = []
    inner = session_copies.Carrier._move

    def slow(self, work, pieces):
        while not gate:
            time.sleep(0.001)
        return inner(self, work, pieces)

    monkeypatch.setattr(session_copies.Carrier, "_move", slow)
    for action in ("save", "restore"):
        gate.clear()
        core.sessions.add(SessionCall("1", action, "a"))
        for seed in range(4):  # more than the pools hold
            prompt = random_prompt(80, seed=20 + seed)
            core.add_request(request(f"{seed}", prompt, max_tokens=6))
            answers = {}
            while core.scheduler.has_work:
                for output in core.step():
                    answers.setdefault(output.request_id, []).extend(output.token_ids)
                assert not core.sessions.advance()
                core.check_integrity()
            assert answers[f"{seed}"] == answer(plain, prompt, max_tokens=6).token_ids
        gate.append(True)
        assert core.sessions.is_busy and core.has_work
        while not (found := core.sessions.advance()):
            time.sleep(0.001)
        assert found[0].error is None
        drain(core)
    expected = answer(plain, conversation + MORE, max_tokens=6).token_ids
    before = core.stats().prefix_cache_hits_total
    assert answer(core, conversation + MORE, max_tokens=6).token_ids == expected
    assert core.stats().prefix_cache_hits_total - before >= len(conversation) - 1


# -- what does not ----------------------------------------------------------------------------------------------


def test_without_a_folder_there_are_no_sessions(tiny):
    core = engines.make_core(tiny.folder)
    talk(core)
    for action in ("save", "restore", "delete", "list"):
        refused(core, action, "sessions_disabled", "session_folder")
    assert not core.info.has_sessions


@pytest.mark.parametrize("session_id", ["", "../a", "a/b", "a.b", ".", "a" * 65, "ü", "a\n", "a\0"])
def test_an_id_is_never_a_path(make_core, session_id):
    core = make_core()
    for action in ("save", "restore", "delete"):
        refused(core, action, "session_id_invalid", "64", session_id=session_id)


def test_an_unknown_id_is_said_to_be_unknown(make_core):
    core = make_core()
    refused(core, "save", "session_not_found", "session_id")
    refused(core, "restore", "session_not_found", "GET /v1/sessions")
    refused(core, "delete", "session_not_found")


def test_a_conversation_that_was_evicted_is_told_with_its_remedy(make_core):
    core = make_core(num_kv_blocks=16)
    conversation = talk(core)
    talk(core, random_prompt(240, seed=6), session_id="b")
    refused(core, "save", "session_evicted", "num_kv_blocks", "again")
    assert not path_of(core).exists()
    talk(core, conversation)
    done(core, "save")


def test_where_memory_holds_no_snapshots_nothing_is_saved_or_restored(make_core, monkeypatch):
    saved(make_core())
    monkeypatch.setattr(memory, "_plan_snapshots", lambda *sizes: 0)
    core = make_core()
    refused(core, "restore", "session_no_room", "snapshots")
    talk(core)
    refused(core, "save", "session_evicted", "snapshots")


def test_a_request_that_leaves_nothing_in_the_cache_can_be_no_session(make_core):
    core = make_core()
    for fields in ({"prefix_cache": False}, {"prompt_logprobs": 1}, {"max_tokens": 0}):
        with pytest.raises(RequestError, match="prefix_cache"):
            core.add_request(request("r", PROMPT, **({"session_id": "a", "max_tokens": 4} | fields)))


def test_another_models_session_is_refused(make_core, tmp_path):
    saved(make_core())
    folder = tmp_path / "other"
    save_minimax(folder, layer_types=("linear_attention", "full_attention"), seed=1)
    other = engines.make_core(folder, device=DEVICE, session_folder=tmp_path / "saved")
    refused(other, "restore", "session_mismatch", "another model")
    nothing_taken(other)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"dtype": "bfloat16"}, "another model"),
        ({"snapshot_dtype": "bfloat16"}, "snapshot_dtype"),
        ({"max_model_len": 50}, "max_model_len"),
    ],
    ids=str,
)
def test_other_settings_are_named(make_core, settings, word):
    saved(make_core())
    core = make_core(**settings)
    refused(core, "restore", "session_mismatch", word)
    nothing_taken(core)


def test_a_session_as_long_as_the_context_is_restored_and_a_longer_one_refused(make_core):
    num_known = len(saved(make_core())) - 1
    assert done(make_core(max_model_len=num_known), "restore").num_tokens == num_known
    refused(make_core(max_model_len=num_known - 1), "restore", "session_mismatch", "raise max_model_len")


def test_too_few_blocks_leave_the_cache_whole(make_core):
    saved(make_core(), prompt=random_prompt(150, seed=3))
    core = make_core(num_kv_blocks=16)
    core.add_request(request("running", random_prompt(110, seed=4), max_tokens=30))
    talking = request("cached", random_prompt(20, seed=5), max_tokens=2)
    core.add_request(talking)
    for _ in range(8):
        core.step()
    before = core.stats()
    refused(core, "restore", "session_no_room", "num_kv_blocks", "16")
    assert core.stats() == before
    core.abort_request("running")
    drain(core)
    done(core, "restore")


def test_every_wrong_bit_is_found(make_core):
    core = make_core()
    conversation = saved(core)
    path = path_of(core)
    sound = path.read_bytes()
    again = make_core()
    for i in range(60):
        at = (len(sound) - 1) * i // 59
        for bit in (0, 7):
            wrong = bytearray(sound)
            wrong[at] ^= 1 << bit
            path.write_bytes(wrong)
            found = call(again, "restore")
            assert found.error_code in ("session_damaged", "session_mismatch"), (at, bit, found)
            assert str(path) not in found.error
            nothing_taken(again)
    path.write_bytes(sound)
    done(again, "restore")
    assert answer(again, conversation + MORE, max_tokens=4).token_ids


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(make_core, size):
    core = make_core()
    saved(core)
    sound = path_of(core).read_bytes()
    path_of(core).write_bytes(sound[: int(size * len(sound)) if isinstance(size, float) else size])
    again = make_core()
    refused(again, "restore", "session_damaged", "delete")
    nothing_taken(again)


def rewritten(path: Path, change) -> None:
    """Change a file's facts and tensors, and sign it as if nothing had happened."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["session"])
    change(facts, tensors)
    text = json.dumps(facts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, {"format": "leyden.session", "session": text, "sha256": digest})


KEY = "layers.1.key"
FORGERIES = {
    "version": lambda facts, _: facts.update(version=3),
    "no version": lambda facts, _: facts.pop("version"),
    "a field more": lambda facts, _: facts.update(more=1),
    "a wrong type": lambda facts, _: facts.update(ends="all"),
    "no ends": lambda facts, _: facts.update(ends=[]),
    "ends beyond the tokens": lambda facts, _: facts.update(ends=[10, 1000]),
    "ends that fall": lambda facts, _: facts.update(ends=[56, 44]),
    "an end at 0": lambda facts, _: facts.update(ends=[0, 56]),
    "an end too many": lambda facts, _: facts.update(ends=[10, 20, 56]),
    "too few checksums": lambda facts, _: facts.update(checksums=facts["checksums"][:-8]),
    "checksums that are none": lambda facts, _: facts.update(checksums="x" * len(facts["checksums"])),
    "wrong checksums": lambda facts, _: facts.update(checksums="0" * len(facts["checksums"])),
    "no tokens": lambda _, tensors: tensors.pop("tokens"),
    "tokens of another dtype": lambda _, tensors: tensors.update(tokens=tensors["tokens"].float()),
    "fewer tokens": lambda _, tensors: tensors.update(tokens=tensors["tokens"][:-1].clone()),
    "keys of another shape": lambda _, tensors: tensors.update(
        {"layers.1.key": tensors["layers.1.key"][:, :1].clone()}
    ),
    "a tensor more": lambda _, tensors: tensors.update(more=tensors["tokens"].clone()),
    "no states": lambda _, tensors: tensors.pop("layers.0.state"),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_file_is_refused(make_core, forge):
    core = make_core(async_scheduling=False)
    saved(core)
    rewritten(path_of(core), forge)
    again = make_core()
    found = call(again, "restore")
    assert found.error_code in ("session_damaged", "session_mismatch"), found
    nothing_taken(again)


def test_a_file_of_an_earlier_format_is_refused_and_the_remedy_told(make_core):
    core = make_core()
    saved(core)
    rewritten(path_of(core), lambda facts, _: facts.update(version=1))
    refused(make_core(), "restore", "session_mismatch", "format 1", "reads format 2", "delete the session")


@pytest.mark.parametrize("token", [-1, 320, 2**31 - 1])
def test_token_ids_outside_the_vocabulary_are_refused(make_core, token):
    def forge(facts, tensors):
        tensors["tokens"][3] = token
        facts["checksums"] = facts["checksums"][:-8] + f"{checksum(tensors['tokens'].numpy().view(np.uint8)):08x}"

    core = make_core()
    saved(core)
    rewritten(path_of(core), forge)
    refused(core, "restore", "session_damaged", "token ids")


def test_a_header_that_claims_to_be_huge_is_refused(make_core):
    core = make_core()
    saved(core)
    path_of(core).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused(core, "restore", "session_damaged", "safetensors")


@pytest.mark.parametrize("make", [os.symlink, os.link, lambda _, path: os.mkfifo(path), lambda _, path: os.mkdir(path)])
def test_only_a_file_of_its_own_is_read(make_core, tmp_path, make):
    core = make_core()
    saved(core)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path_of(core).unlink()
    make(secret, path_of(core))
    refused(core, "restore", "session_damaged")
    listed = [file.session_id for file in done(core, "list").files]
    assert listed == (["a"] if path_of(core).is_file() and not path_of(core).is_symlink() else [])


# -- files ------------------------------------------------------------------------------------------------------


def test_a_file_is_private_and_whole_or_not_there(make_core, monkeypatch):
    core = make_core()
    saved(core)
    assert stat.S_IMODE(path_of(core).stat().st_mode) == 0o600
    assert stat.S_IMODE(core.sessions.folder.stat().st_mode) == 0o700
    before = path_of(core).read_bytes()
    talk(core)
    monkeypatch.setattr(os, "pwrite", lambda *_: exec("raise OSError(28, 'No space left on device')"))
    refused(core, "save", "session_no_room", "No space left")
    assert path_of(core).read_bytes() == before
    assert [path.name for path in core.sessions.folder.iterdir()] == ["a.safetensors"]


def test_remains_of_a_killed_server_are_removed_at_the_next_start(make_core):
    core = make_core()
    saved(core)
    old, young = core.sessions.folder / ".a.x.part", core.sessions.folder / ".a.y.part"
    for path in (old, young):
        path.write_text("")
    os.utime(old, (0, 0))
    make_core()
    assert {path.name for path in core.sessions.folder.iterdir()} == {"a.safetensors", young.name}


def test_other_programs_read_it(make_core):
    core = make_core()
    conversation = saved(core)
    with safe_open(path_of(core), framework="pt") as file:
        tokens = file.get_tensor("tokens").tolist()
        assert conversation[: len(tokens)] == tokens
        assert all(len(file.get_tensor(f"layers.1.{part}")) == len(tokens) for part in ("key", "value"))
        assert len(file.get_tensor("layers.0.state")) == len(json.loads(file.metadata()["session"])["ends"])


def test_sessions_are_listed_and_deleted(make_core, monkeypatch):
    core = make_core()
    saved(core)
    talk(core, session_id="b")
    size = done(core, "save", "b").num_bytes
    os.utime(path_of(core, "b"), (0, 0))
    for name in ("notes.txt", "not an id.safetensors", ".safetensors"):
        (core.sessions.folder / name).write_text("not a session")
    listed = done(core, "list", "")
    assert [(file.session_id, file.num_bytes) for file in listed.files] == [("a", size), ("b", size)]
    assert not listed.is_cut and listed.num_bytes == 2 * size
    monkeypatch.setattr(session_folder, "MAX_LISTED", 1)
    assert [file.session_id for file in done(core, "list", "").files] == ["a"] and done(core, "list", "").is_cut
    done(core, "delete")
    assert not path_of(core).exists()
    refused(core, "save", "session_not_found")
    refused(core, "delete", "session_not_found")


def test_a_folder_of_a_sessions_name_is_told_so(make_core):
    core = make_core()
    saved(core)
    path_of(core).unlink()
    path_of(core).mkdir()
    for action in ("restore", "save", "delete"):
        refused(core, action, "session_damaged", *(() if action == "restore" else ("folder",)))
    assert path_of(core).is_dir()


def test_pieces_smaller_than_a_layer_come_together_again(make_core, monkeypatch):
    monkeypatch.setattr(session_format, "PIECE_BYTES", 1024)  # a state's row has 1,024 bytes
    core = make_core()
    conversation = saved(core)
    again = make_core()
    done(again, "restore")
    plain = make_core(session_folder=None, prefix_cache=False)
    expected = answer(plain, conversation + MORE, max_tokens=8).token_ids
    assert answer(again, conversation + MORE, max_tokens=8).token_ids == expected
    assert again.stats().prefix_cache_hits_total >= len(conversation) - 1


def test_a_checksum_tells_any_page_from_any_other():
    data = np.random.default_rng(0).integers(0, 256, 20_003, dtype=np.uint8)
    expected = checksum(data)
    assert checksum(data.copy()) == expected
    for at in (0, 4096, 12_287, 20_002):
        wrong = data.copy()
        wrong[at] ^= 16
        assert checksum(wrong) != expected
    swapped = np.concatenate([data[4096:8192], data[:4096], data[8192:]])
    assert checksum(swapped) != expected


# -- bounds -----------------------------------------------------------------------------------------------------


def test_calls_that_wait_are_bounded_and_served_in_order(make_core, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_CALLS", 3)
    core = make_core()
    for i in range(5):
        core.sessions.add(SessionCall(f"{i}", "list"))
    codes = {}
    while core.sessions.is_busy:
        for each in core.sessions.advance():
            codes[each.call_id] = each.error_code
    assert codes == {"3": "session_queue_full", "4": "session_queue_full", "0": None, "1": None, "2": None}


def test_ids_are_bounded(make_core, monkeypatch):
    monkeypatch.setattr(conversations, "MAX_KNOWN", 2)
    core = make_core()
    for session_id in ("a", "b", "a", "c"):
        talk(core, session_id=session_id)
    refused(core, "save", "session_not_found", session_id="b")
    done(core, "save", "a")


def test_a_bug_is_told_and_the_engine_goes_on(make_core, monkeypatch):
    core = make_core()
    saved(core)
    again = make_core()
    inner = session_copies.Carrier.load
    monkeypatch.setattr(session_copies.Carrier, "load", lambda *_: 1 / 0)
    refused(again, "restore", "session_failed", "log")
    nothing_taken(again)
    monkeypatch.setattr(session_copies.Carrier, "load", inner)
    done(again, "restore")


@pytest.mark.parametrize("make", [InProcessClient, ProcessClient])
async def test_a_session_outlives_its_engine(tiny, tmp_path, make):
    config = engines.engine_config(tiny.folder, session_folder=tmp_path / "saved")
    tokens: list[int] = []
    async with asyncio.timeout(3 * DEADLINE):  # a process begins by importing PyTorch
        for prompt in (PROMPT, None):
            client = make(config)
            try:
                info = await client.start()
                if prompt is None:
                    assert (await client.call_session("restore", "a")).num_tokens == len(PROMPT + tokens) - 1
                    prompt = PROMPT + tokens + MORE
                async for output in client.generate(request("r", prompt, max_tokens=5, session_id="a")):
                    tokens += output.token_ids
                await client.call_session("save", "a")
                with pytest.raises(SessionError, match="no saved session") as error:
                    await client.call_session("restore", "b")
                assert error.value.code == "session_not_found" and info.has_sessions
                cached = client.stats.prefix_cache_hits_total
            finally:
                await client.close()
    assert cached == len(PROMPT) + 4
    with pytest.raises(EngineDeadError):
        await client.call_session("list")


async def test_call_for_a_session_is_told_of_the_engines_death(tiny, tmp_path, monkeypatch):
    client = InProcessClient(engines.engine_config(tiny.folder, session_folder=tmp_path / "saved"))
    await client.start()
    monkeypatch.setattr(sessions.Sessions, "advance", lambda _: 1 / 0)
    async with asyncio.timeout(DEADLINE):
        with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
            await client.call_session("list")
        await client.close()


def test_a_folder_that_cannot_be_used_stops_the_start(make_core, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="session_folder"):
        make_core(session_folder=tmp_path / "file")
