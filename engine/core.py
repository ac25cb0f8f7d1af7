"""The engine: requests in as token ids, tokens out, one step at a time. No threads, no sockets."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import msgspec

from ..configs.schema import EngineConfig
from .collector import Collector
from .errors import ContextLengthError, QueueTimeoutError, RequestError
from .execution.launcher import LaunchedStep, Launcher
from .memory.blocks import BlockManager
from .memory.slots import SlotManager
from .messages import AddRequest, EngineStats
from .outputs import StepOutput, refusal
from .prefix.cache import PrefixCache
from .scheduling.scheduler import Scheduler
from .scheduling.speculation import Speculation
from .sequence import Sequence, Status
from .sessions.calls import Sessions
from .startup.build import build
from .startup.device_memory import hold_share
from .startup.info import engine_info
from .text.grammar import Grammar, GrammarCompiler
from .text.grammar import require as require_grammars
from .text.token_ids import TokenIds
from .text.tokenizer import Tokenizer

logger = logging.getLogger("leyden.engine")

IDLE_SECONDS = 0.001
EXPIRY_SECONDS = 0.25


class EngineCore:
    """Scheduler and model runner, and the bookkeeping between them."""

    def __init__(self, config: EngineConfig, *, progress: bool = True, grammars: GrammarCompiler | None = None) -> None:
        """`grammars`: the result of `grammar_compiler(config)`, passed in so that its tokenizer loads while the model
        does."""
        self.config = config
        built = build(config, progress=progress)
        self.info = engine_info(config, built)
        self.runner, self.plan = built.runner, built.plan
        self.launcher = Launcher(self.runner)
        plan = self.plan
        self.max_model_len = plan.max_model_len
        blocks = BlockManager(plan.num_kv_blocks, config.block_size)
        self.scheduler = Scheduler(
            PrefixCache(blocks, plan.num_snapshots, plan.num_host_snapshots, config.snapshot_min_tokens),
            SlotManager(plan.num_state_slots),
            snapshot_interval=config.snapshot_interval,
            snapshot_every=self.runner.served.snapshot_every,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_waiting=config.max_waiting,
            mixed_prefill_tokens=config.mixed_prefill_tokens,
            ring=self.runner.served.ring,
            speculation=Speculation(config.speculative_tokens, config.speculative_max_rows),
        )
        self.sessions = Sessions(
            config.session_folder,
            self.runner,
            self.scheduler.reuse,
            self.scheduler.operations,
            plan.max_model_len,
        )
        self._stats = EngineStats()
        self._collector = Collector(self.scheduler, self._stats)
        self._arrivals = 0
        self._next_expiry = 0.0  # the next search for late requests, on the clock of `time.monotonic`
        on_cuda = self.runner.device.type == "cuda"
        self._is_async = on_cuda if config.async_scheduling is None else config.async_scheduling
        self._in_flight: LaunchedStep | None = None
        self._grammars = grammars or grammar_compiler(config)
        self._compiling: list[tuple[Sequence, Grammar]] = []  # sequences whose grammar is not known to compile

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None or self.sessions.is_busy

    def add_request(self, request: AddRequest) -> None:
        """Queue a request. Raises `RequestError`, `ContextLengthError` or `QueueFullError`, and then keeps nothing of
        it."""
        max_tokens = self.check(request)
        if request.eos_token_ids is None:
            request = msgspec.structs.replace(request, eos_token_ids=list(self.runner.served.spec.eos_token_ids))
        params, limit = request.sampling_params, request.max_queue_seconds
        self._arrivals += 1
        seed = params.seed if params.seed is not None else (self.config.seed << 32) + self._arrivals
        sequence = Sequence(request, max_tokens, self._arrivals, seed)
        now = time.perf_counter()
        self.scheduler.add(sequence, math.inf if limit is None else time.monotonic() + limit)
        self._collector.add(sequence, now)
        if params.grammar is not None:  # only here: a refused request compiles no grammar
            sequence.grammar = self._grammars.compile(params.grammar)
            self._compiling.append((sequence, sequence.grammar))

    def check(self, request: AddRequest) -> int:
        """Return the most tokens of the answer. Raises `RequestError` for a request that can never be served."""
        params, prompt = request.sampling_params, request.prompt_token_ids
        vocab = self.runner.served.spec.vocab_size
        if request.request_id in self.scheduler:
            raise RequestError(f"request id {request.request_id!r} is in use", "request_id")
        if not prompt:
            raise RequestError("the prompt is empty; send at least one token", "prompt")
        for name, ids in (
            ("prompt", prompt),
            ("stop_token_ids", TokenIds(params.stop_token_ids)),
            ("logit_bias", TokenIds(params.logit_bias or ())),
        ):
            if (wrong := ids.first_outside(vocab)) is not None:
                raise RequestError(f"{name} holds token id {wrong}; ids must be in [0, {vocab})", name)
        if params.grammar is not None:
            require_grammars("grammar")
        room = self.max_model_len - len(prompt)
        if room < (1 if params.max_tokens is None else params.max_tokens):
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}, but the context holds "
                f"{self.max_model_len}; shorten the prompt or the answer",
                "max_tokens" if len(prompt) < self.max_model_len else "prompt",
            )
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if request.session_id is not None and not request.uses_cache:
            raise RequestError(
                "session_id needs the prefix cache: leave out prefix_cache: false and the scores of the prompt (echo "
                "with logprobs), and ask for at least one token",
                "session_id",
            )
        return max_tokens

    def abort_request(self, request_id: str) -> None:
        """Remove a request and free its slot and blocks. Ignores an unknown id: the request has just finished."""
        sequence = self.scheduler.abort(request_id)
        if sequence is not None:
            self._collector.forget(sequence)

    def step(self, tell_started: Callable[[list[str]], None] | None = None) -> list[StepOutput]:
        """Launch one batch, and return its outputs. tell_started: called before the launch with the ids of the requests
        that start with it.

        With asynchronous scheduling the outputs are of the batch before. So the device does not wait for the host, and
        the host is at most two steps ahead. A sequence that ends in the batch before is computed once more in vain. Its
        slot and blocks are free for batches that are launched later.
        """
        started = time.perf_counter()
        refused = [*self._expire(time.monotonic()), *self._refuse_bad_grammars()]
        batch = self.scheduler.schedule()
        scheduled = time.perf_counter()
        if batch.started:
            self._collector.start(batch.started, scheduled)
            if tell_started is not None:
                tell_started([sequence.request_id for sequence in batch.started])
        launched, scored = None, []
        if not batch.is_empty:
            launched = self.launcher.launch(batch)
            scored = self._collector.prompt_scores(launched)
            self.scheduler.update(batch)
            self._stats.steps_total += 1
        elif self.has_work and self._in_flight is None:  # work waits for a grammar, siblings or a session call
            time.sleep(IDLE_SECONDS)  # lets other threads run
        if self._is_async:
            launched, self._in_flight = self._in_flight, launched
        waiting = time.perf_counter()
        tokens, logprobs = launched.wait() if launched else ([], [])
        waited = time.perf_counter() - waiting
        outputs = refused + scored + (self._collector.collect(launched, tokens, logprobs) if launched else [])
        seconds = time.perf_counter() - started
        self._stats.step_seconds_total += seconds
        self._stats.schedule_seconds_total += scheduled - started
        self._stats.host_seconds_total += seconds - waited
        if batch.sequences and not batch.num_prefills:
            self._stats.decode_steps_total += 1
            self._stats.decode_host_seconds_total += seconds - waited
        return outputs

    def stats(self) -> EngineStats:
        """The numbers of this moment."""
        scheduler = self.scheduler
        return msgspec.structs.replace(
            self._stats,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            state_slots_used=scheduler.slots.num_used,
            kv_blocks_used=scheduler.blocks.num_used,
            kv_blocks_cached=scheduler.blocks.num_cached,
            snapshots_used=scheduler.cache.num_snapshots_used,
            host_snapshots_used=scheduler.cache.num_host_snapshots_used,
            prefix_cache_queries_total=scheduler.reuse.num_queried_tokens,
            prefix_cache_hits_total=scheduler.reuse.num_cached_tokens,
            draft_tokens_total=scheduler.speculation.num_drafted,
            accepted_tokens_total=scheduler.speculation.num_accepted,
            preemptions_total=scheduler.num_preemptions,
        )

    def hold_share(self) -> None:
        """Keep all of this process's memory on the device within the configured share. For a process of the engine
        alone."""
        hold_share(self.runner.device, self.info.memory)

    def check_integrity(self) -> None:
        """Every slot, block and snapshot has its owners. Raises AssertionError."""
        self.scheduler.check_integrity()
        self._collector.check_integrity()

    def _expire(self, now: float) -> list[StepOutput]:
        """Refuse requests that have waited too long. Searches for them once in `EXPIRY_SECONDS`."""
        if now < self._next_expiry:
            return []
        self._next_expiry = now + EXPIRY_SECONDS
        late = self.scheduler.expire(now)
        for sequence in late:
            self._collector.forget(sequence)
        return [refusal(sequence.request_id, QueueTimeoutError()) for sequence in late]

    def _refuse_bad_grammars(self) -> list[StepOutput]:
        """Refuse the requests whose grammar did not compile. Makes the sequences ready whose grammar did."""
        outputs = []
        for sequence, grammar in self._compiling.copy():
            if not grammar.is_compiled:
                continue
            self._compiling.remove((sequence, grammar))
            error = grammar.error
            grammar.is_ready = error is None
            if error is not None and sequence.status is not Status.FINISHED:
                self.scheduler.finish(sequence)
                self._collector.forget(sequence)
                outputs.append(refusal(sequence.request_id, RequestError(f"grammar: {error}", "grammar")))
        return outputs


def grammar_compiler(config: EngineConfig) -> GrammarCompiler:
    """A compiler of grammars for the model's tokenizer, which it loads on first use or by `prepare`."""
    return GrammarCompiler(lambda: Tokenizer.of(config).for_grammars())
