"""A byte-level tokenizer and a scripted engine, for the real `AsyncLLM` and the real server."""

from __future__ import annotations

import asyncio
import re
import threading

from leyden.engine.errors import EngineDeadError, QueueFullError, RequestError
from leyden.engine.messages import EngineInfo, EngineStats, MemoryUse, SessionDone
from leyden.engine.outputs import StepOutput, TokenLogprobs
from leyden.engine.text.template_inputs import template_inputs
from tiny_models import byte_tokenizer

BOS, EOS, USER, ASSISTANT, SYSTEM, TOOL = range(256, 262)
SPECIAL = {BOS: "<s>", EOS: "</s>", USER: "<user>", ASSISTANT: "<assistant>", SYSTEM: "<system>", TOOL: "<tool>"}
ROLE_IDS = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "tool": TOOL}
VOCAB_SIZE = 262
MAX_MODEL_LEN = 128


class FakeTokenizer:
    """One token per byte, and six control tokens. A prompt begins with BOS."""

    def __init__(self):
        self.vocab_size = VOCAB_SIZE
        self.max_token_chars = 11
        self.bos_token_id = BOS
        self.eos_token_ids = frozenset({EOS})
        self.control_ids = frozenset(range(256, VOCAB_SIZE))
        self.has_chat_template = True
        self.chat_template = ""
        self.special = dict(SPECIAL)
        self.added_ids = {text: token_id for token_id, text in SPECIAL.items()}
        self.chats = []  # (messages, tools) of every conversation
        self.default_sampling = {}
        self.threads = set()

    @property
    def template_inputs(self):
        return template_inputs([self.chat_template])

    @property
    def takes_tools(self):
        return "tools" in self.chat_template

    def encode(self, text, add_special_tokens=True, parse_special=False):
        self.threads.add(threading.get_ident())
        pieces = re.split("(" + "|".join(self.special.values()) + ")", text) if parse_special else [text]
        ids = {text: [token_id] for token_id, text in self.special.items()}
        encoded = (ids[piece] if parse_special and piece in ids else list(piece.encode()) for piece in pieces)
        return [BOS] * add_special_tokens + [token_id for piece in encoded for token_id in piece]

    def for_grammars(self):
        from llguidance.hf import from_tokenizer

        return from_tokenizer(byte_tokenizer(), n_vocab=512, eos_token=0)

    def encode_chat(
        self, messages, *, add_generation_prompt=True, continue_final_message=False, tools=None, template_kwargs=None
    ):
        self.chats.append((messages, tools))
        self.template_kwargs = template_kwargs
        if messages[0]["content"] == "refuse me":
            raise RequestError("the chat template refused the messages: no", "messages")
        ids = [BOS]
        for message in messages:
            ids += [ROLE_IDS[message["role"]], *message["content"].encode(), EOS]
        if continue_final_message:
            ids.pop()
        return ids + [ASSISTANT] * add_generation_prompt

    def encode_conversation(self, messages, **settings):
        return self.encode_chat(messages, **settings), 0

    def decode(self, ids, skip_special_tokens=True):
        special = {i: b"" if skip_special_tokens else text.encode() for i, text in self.special.items()}
        return b"".join(special[i] if i in special else bytes([i]) for i in ids).decode("utf-8", errors="replace")

    def token_text(self, token_id):
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id):
        return self.special[token_id].encode() if token_id in self.special else bytes([token_id])


class FakeEngine:
    """Answers `reply` and then EOS, one token per output. Every attribute may be changed by a test."""

    def __init__(self):
        self.info = EngineInfo(
            model_path="/models/tiny",
            architecture="Fake",
            num_parameters=1,
            layer_counts={"lightning": 3, "softmax": 1},
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=[EOS],
            device="cpu",
            device_name="cpu",
            dtype="float32",
            state_dtype="float32",
            linear_backend="minimax",
            kernels="torch",
            num_state_slots=8,
            has_sessions=True,
            max_waiting=1024,
            num_kv_blocks=10,
            num_snapshots=6,
            num_host_snapshots=4,
            block_size=16,
            weight_bytes=1,
            memory=MemoryUse(total=1000, weights=400, state=100, kv=200, sampler=10, workspace=50, graphs=30, other=60),
            state_bytes_per_slot=1,
            kv_bytes_per_token=1,
        )
        self.stats = EngineStats()
        self.is_healthy = True
        self.reply = b"Hello, world"
        self.choose_reply = lambda request: self.reply
        self.count_cached = lambda request: 0  # tokens of its prompt
        self.queue_bound = 10**6
        self.hold_after = None  # stop giving tokens after so many, until the request is closed
        self.die_after = None
        self.fail_after = None
        self.abort_after = None
        self.is_faulty = lambda request: True  # the requests that have the faults above
        self.requests = []
        self.num_open = 0
        self.num_aborted = 0
        self.calls = []  # (action, session id)
        self.session_error = None
        self.session_done = SessionDone(call_id="1", num_tokens=7, num_bytes=100, seconds=0.5)

    async def call_session(self, action, session_id=""):
        if not self.is_healthy:
            raise EngineDeadError("secret internals: dead")
        self.calls.append((action, session_id))
        if self.session_error is not None:
            raise self.session_error
        return self.session_done

    async def generate(self, request):
        if not self.is_healthy:
            raise EngineDeadError("secret internals: dead")
        if self.num_open >= self.queue_bound:
            raise QueueFullError(f"max_waiting ({self.queue_bound}) requests wait already", retry_after=7)
        self.requests.append(request)
        self.num_open += 1
        is_finished = False
        try:
            async for output in self._outputs(request):
                is_finished = output.finish_reason is not None
                yield output
        except EngineDeadError:
            is_finished = True
            raise
        finally:
            self.num_open -= 1
            self.num_aborted += not is_finished

    async def _outputs(self, request):
        params, request_id = request.sampling_params, request.request_id
        prompt_logprobs = self._prompt_logprobs(request)
        if params.max_tokens == 0:
            yield StepOutput(
                request_id=request_id, prompt_logprobs=prompt_logprobs, num_cached_tokens=0, finish_reason="length"
            )
            return
        ids = [*self.choose_reply(request), *([] if params.ignore_eos else [EOS])]
        for count, token_id in enumerate(ids[: params.max_tokens], start=1):
            await asyncio.sleep(0)
            while self.hold_after is not None and count > self.hold_after:  # noqa: ASYNC110 - other threads set it
                await asyncio.sleep(0.002)
            if self.die_after is not None and count > self.die_after and self.is_faulty(request):
                raise EngineDeadError("secret internals: dead")
            for bound, reason in ((self.fail_after, "error"), (self.abort_after, "abort")):
                if bound is not None and count > bound and self.is_faulty(request):
                    yield StepOutput(request_id=request_id, finish_reason=reason, error="NaN in the logits")
                    return
            is_stop = token_id == EOS or token_id in params.stop_token_ids
            yield StepOutput(
                request_id=request_id,
                token_ids=[token_id],
                logprobs=None if params.logprobs is None else [self.logprobs(token_id, params.logprobs)],
                prompt_logprobs=prompt_logprobs,
                queue_seconds=0.25 if count == 1 else None,
                num_cached_tokens=self.count_cached(request) if count == 1 else None,
                finish_reason="stop" if is_stop else "length" if count == params.max_tokens else None,
                stop_token_id=token_id if is_stop else None,
            )
            if is_stop:
                return
            prompt_logprobs = None
        if params.ignore_eos and len(ids) < params.max_tokens:
            yield StepOutput(request_id=request_id, finish_reason="length")

    def _prompt_logprobs(self, request):
        num_top = request.sampling_params.prompt_logprobs
        if num_top is None:
            return None
        return [None, *(self.logprobs(token_id, num_top) for token_id in request.prompt_token_ids[1:])]

    @staticmethod
    def logprobs(token_id, num_top):
        """The chosen token is the third likeliest, so that it lies outside a top 1."""
        ranking = [((token_id + 1) % 256, -0.25), ((token_id + 2) % 256, -0.5), (token_id, -1.5)]
        ranking += [((token_id + k) % 256, -float(k)) for k in range(3, 21)]
        top = ranking[:num_top]
        return TokenLogprobs.of(token_id, -1.5, top if num_top >= 3 else [*top, ranking[2]])

    async def start(self):
        return self.info

    async def wait_dead(self):
        await asyncio.Event().wait()

    async def close(self):
        self.is_healthy = False
