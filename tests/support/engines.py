"""Small engines on the CPU, and a plain way to feed them and to collect what they answer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from leyden.configs.schema import EngineConfig
from leyden.engine.core import EngineCore
from leyden.engine.execution.arrays import upload
from leyden.engine.execution.block_tables import BlockTables, SentBlocks
from leyden.engine.execution.composer import StepComposer
from leyden.engine.execution.graph_shapes import GraphShape
from leyden.engine.execution.graphs import StepGraphs
from leyden.engine.execution.launcher import Launcher
from leyden.engine.execution.padding import GraphInputs
from leyden.engine.execution.runner import ModelRunner
from leyden.engine.execution.step_input import make_batch
from leyden.engine.memory.ring import RingRule
from leyden.engine.messages import AddRequest, SessionCall
from leyden.engine.outputs import StepOutput, TokenLogprobs
from leyden.engine.sampling_params import SamplingParams
from leyden.engine.scheduling.step import ScheduledBatch
from leyden.engine.sequence import Sequence
from leyden.engine.text.token_ids import TokenIds
from leyden.models.forward_batch import ForwardBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # for tests that are worth running on either


@dataclass
class Answer:
    """Everything the engine said about one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: str | None = None
    num_cached_tokens: int | None = None

    def add(self, output: StepOutput) -> None:
        assert self.finish_reason is None, "an output after the last one"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert not self.token_ids, "scores of a prompt after its answer has begun"
            self.prompt_logprobs = [*(self.prompt_logprobs or []), *output.prompt_logprobs]
        self.finish_reason, self.stop_token_id = output.finish_reason, output.stop_token_id
        self.error = output.error
        if output.num_cached_tokens is not None:
            assert self.num_cached_tokens is None, "the cached tokens were told twice"
            self.num_cached_tokens = output.num_cached_tokens


def engine_config(folder: Path, **settings: Any) -> EngineConfig:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "max_num_batched_tokens": 64}
    limits = {"cpu_memory_gb": 0.05, "num_threads": 1, "max_model_len": 256}
    return EngineConfig(model=str(folder), **(defaults | limits | settings))


def make_core(folder: Path, **settings: Any) -> EngineCore:
    return EngineCore(engine_config(folder, **settings), progress=False)


def use_graphs(core: EngineCore, shapes: Items[GraphShape]) -> EngineCore:
    """The engine, whose steps of these shapes run from graphs from now on."""
    runner = core.runner
    graphs = StepGraphs(runner.compute, shapes, runner.tables, runner.device)
    core.runner = ModelRunner(runner.served, runner.pools, graphs)
    core.launcher = Launcher(core.runner)
    return core


def computed(core: EngineCore) -> list[int]:
    """Grows by the number of tokens of every step that is launched."""
    launch, counts = core.launcher.launch, []

    def counting(batch):
        counts.append(sum(batch.num_scheduled_tokens))
        return launch(batch)

    core.launcher.launch = counting
    return counts


def request(
    request_id: str,
    prompt: list[int],
    *,
    eos: Any = (),
    **fields: Any,
) -> AddRequest:
    """Greedy unless told otherwise, and without the checkpoint's stop ids. Names of sampling parameters go to them,
    other names to the request."""
    own = {name: fields.pop(name) for name in AddRequest.__struct_fields__ if name in fields}
    sampling = SamplingParams(**({"temperature": 0.0} | fields))
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling_params=sampling,
        eos_token_ids=None if eos is None else list(eos),
        **own,
    )


def drain(core: EngineCore, *requests: AddRequest, max_steps: int = 2000) -> dict[str, Answer]:
    """Add the requests, step until nothing is left, and check that everything was given back."""
    answers: dict[str, Answer] = {}
    for each in requests:
        core.add_request(each)
    for _ in range(max_steps):
        if not core.has_work:
            break
        for output in core.step():
            answers.setdefault(output.request_id, Answer()).add(output)
        core.sessions.advance()
        core.check_integrity()
    assert not core.has_work, "the engine does not come to an end"
    assert_nothing_held(core)
    return answers


def answer(core: EngineCore, prompt: list[int], **params: Any) -> Answer:
    """The answer to one request that is alone in the engine."""
    return drain(core, request("alone", prompt, **params))["alone"]


def call_session(core: EngineCore, action: str, session_id: str = "a") -> None:
    """Save or restore a session, and wait until that is done."""
    core.sessions.add(SessionCall("1", action, session_id))
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for done in core.sessions.advance():
            assert done.error_code is None, done.error
            return
        time.sleep(0.001)
    raise AssertionError("the call does not come to an end")


def assert_nothing_held(core: EngineCore) -> None:
    stats = core.stats()
    held = (stats.num_running, stats.num_waiting, stats.state_slots_used, stats.kv_blocks_used)
    assert held == (0, 0, 0, 0), f"running, waiting, slots, blocks = {held}"
    core.check_integrity()


def build_batch(scheduled: ScheduledBatch, tables: BlockTables, block_size: int) -> ForwardBatch:
    """A step's batch as the runner makes it, on the tables' device."""
    blocks = SentBlocks(tables.table.shape[1])
    composer = StepComposer(blocks, GraphInputs(()), block_size=block_size, vocab_size=1000, ring=RingRule())
    step, _ = composer.compose(scheduled)
    sent = upload(step.arrays, tables.table.device)
    tables.write(sent["cells"], sent["blocks"])
    return make_batch(sent, step.counts, tables.view(step.num_columns))


def sequence(
    prompt: list[int] | int, *, request_id: str = "s", output: tuple[int, ...] = (), **fields: Any
) -> Sequence:
    """A sequence by hand, greedy or not as `SamplingParams` has it. Names of a sequence's own fields go to it, names of
    the request's fields to that, others to the sampling parameters. Without `prefix_cache=True` it does not use the
    cache."""
    own = {each.name for each in dataclasses.fields(Sequence) if each.init} & fields.keys()
    of_request = set(AddRequest.__struct_fields__) & fields.keys()
    params = {name: value for name, value in fields.items() if name not in own | of_request}
    if "max_tokens" in fields:
        params["max_tokens"] = fields["max_tokens"]
    made = Sequence(
        AddRequest(
            request_id=request_id,
            prompt_token_ids=TokenIds(range(prompt) if isinstance(prompt, int) else prompt),
            sampling_params=SamplingParams(**params),
            **({"prefix_cache": False} | {name: fields[name] for name in of_request}),
        ),
        output_token_ids=list(output),
        **{name: fields[name] for name in own - {"block_table"}},
    )
    made.block_table.extend(fields.get("block_table", ()))
    return made
