"""Whatever computes or copies does so on the device of the settings: each thread makes it its current one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engines import answer, engine_config, make_core
from leyden import kernels
from leyden.engine import llm
from leyden.engine.boundary.in_process import InProcessClient
from leyden.engine.messages import AddRequest
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.sessions import calls as sessions
from leyden.engine.sessions import carrier as session_copies
from leyden.engine.startup import model as startup_model
from leyden.models.loading import reader as weight_reader
from tiny_models import random_prompt

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def test_a_cuda_device_becomes_the_current_one(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    kernels.use_device(torch.device("cuda:1"))
    kernels.use_device(torch.device("cuda"))
    kernels.use_device(torch.device("cpu"))
    assert used == [torch.device("cuda:1")]


@pytest.fixture
def used(monkeypatch) -> list[tuple[str, torch.device]]:
    """(thread, device), for each time that a thread chose its device."""
    found = []

    def note(device: torch.device) -> None:
        found.append((threading.current_thread().name, device))

    for module in (startup_model, llm, sessions, session_copies, weight_reader):
        monkeypatch.setattr(module, "use_device", note)
    return found


async def test_every_thread_of_an_engine_uses_its_device(tiny, tmp_path, used, monkeypatch):
    started, start = [], threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    client = InProcessClient(engine_config(tiny.folder, session_folder=str(tmp_path / "sessions")))
    await client.start()
    params = SamplingParams(max_tokens=4, temperature=0.0)
    request = AddRequest(request_id="a", prompt_token_ids=random_prompt(40, 1), sampling_params=params, session_id="s")
    async for _ in client.generate(request):
        pass
    for action in ("save", "restore"):
        await client.call_session(action, "s")
    await client.close()
    kinds = {name.rpartition("_")[0] or name for name in started}
    assert kinds >= {"leyden-engine", "session", "sessions", "weights"}
    without = {"asyncio", "grammar", "tqdm"}  # they read and write nothing on the device
    assert kinds - without == {name.rpartition("_")[0] or name for name, _ in used}
    assert {name for name in started if name.rpartition("_")[0] not in without} == {name for name, _ in used}
    assert {device for _, device in used} == {torch.device("cpu")}


def test_a_thread_that_did_not_make_the_engine_uses_its_device(tiny, used):
    engine = llm.LLM(str(tiny.folder), dtype="float32", device="cpu", cpu_memory_gb=0.05)
    with ThreadPoolExecutor(1, "another") as threads:
        threads.submit(engine.generate, [[1, 2, 3]], SamplingParams(max_tokens=2)).result()
    assert ("another_0", torch.device("cpu")) in used


@pytest.mark.gpu
@needs_two
@torch.inference_mode()
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "eager"])
def test_an_engine_on_the_second_gpu_leaves_the_first_alone(tiny, cuda_graphs):
    prompt, settings = random_prompt(40, 1), {"cuda_graphs": cuda_graphs, "memory_fraction": 0.2}
    expected = answer(make_core(tiny.folder, device="cuda:0", **settings), prompt, max_tokens=30).token_ids
    before = torch.cuda.memory_allocated(0)
    with torch.cuda.device(0):  # the thread's afterwards
        core = make_core(tiny.folder, device="cuda:1", **settings)
        assert answer(core, prompt, max_tokens=30).token_ids == expected
    assert torch.cuda.memory_allocated(1) > 0 and torch.cuda.memory_allocated(0) <= before
