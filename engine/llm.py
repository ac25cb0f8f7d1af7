"""The offline interface: prompts in, texts out, in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from ..configs.schema import EngineConfig
from ..configs.sources import what_was_meant
from ..kernels import use_device
from .core import EngineCore
from .errors import ConfigError, RequestError
from .messages import AddRequest
from .outputs import FinishReason, RequestOutput, TokenLogprobs, joined
from .sampling_params import SamplingParams
from .text.detokenizer import TextStream
from .text.token_ids import TokenIds
from .text.tokenizer import Tokenizer

Prompt = str | list[int]
NO_LIMIT = 1 << 20  # tokens


@dataclass(slots=True)
class Completion:
    """One finished answer."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache

    def add(self, output: RequestOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        self.prompt_logprobs = joined(self.prompt_logprobs, output.prompt_logprobs)
        self.num_cached_tokens += output.num_cached_tokens or 0
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


class LLM:
    """A model and its engine.

    >>> llm = LLM("demo")
    >>> llm.chat([{"role": "user", "content": "Tell me a story."}])[0].text

    Keyword arguments are the fields of `EngineConfig`. No client streams the answers, so `mixed_prefill_tokens` is
    unlimited by default: prompts do not wait for decode rows. Raises `ConfigError` or `CheckpointError`.
    """

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        for name in settings:
            if name not in EngineConfig.model_fields:
                raise ConfigError(f"unknown setting {name!r}; {what_was_meant(name, EngineConfig.model_fields)}")
        try:
            config = EngineConfig(model=model, **({"mixed_prefill_tokens": NO_LIMIT} | settings))
        except ValidationError as error:
            raise ConfigError("; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())) from None
        self.tokenizer = Tokenizer.of(config)  # first: its errors come before the model is loaded
        self.core = EngineCore(config, progress=False)
        self._count = 0

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        cache_salt: str | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue each prompt (text or token ids). Returns `n` answers per prompt, in the order of the prompts.

        params: one for all prompts, or one per prompt. cache_salt: prompts share the prefix cache only with prompts of
        the same salt. Raises `RequestError` if one of the prompts cannot be served; then no prompt is run. Raises
        `TypeError` for arguments of a wrong type.
        """
        _check_params(params)
        ids = [self._encode(prompt) for prompt in _as_prompts(prompts)]
        each = params if isinstance(params, list) else [params or SamplingParams()] * len(ids)
        if len(each) != len(ids):
            raise RequestError(f"{len(ids)} prompts but {len(each)} sampling params; give one, or one each", "params")
        choices = [(prompt, one.choice(j)) for prompt, one in zip(ids, each, strict=True) for j in range(one.n)]
        requests = [self._request(prompt, choice, cache_salt) for prompt, choice in choices]
        return self._run(requests, progress)

    def chat(
        self,
        conversations: list[dict[str, Any]] | list[list[dict[str, Any]]],
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Answer one conversation (a list of messages) or several, rendered by the checkpoint's chat template. Raises
        the errors of `generate`."""
        _check_params(params)
        several = _as_conversations(conversations)
        prompts: list[Prompt] = [self.tokenizer.encode_chat(messages) for messages in several]
        params = params or SamplingParams(max_tokens=256)
        return self.generate(prompts, params, cache_salt=cache_salt, progress=progress)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _run(self, requests: list[AddRequest], progress: bool) -> list[Completion]:
        use_device(self.core.runner.device)  # the thread need not be the one that made the engine
        completions = [Completion(request.prompt_token_ids.tolist()) for request in requests]
        for request in requests:
            self.core.check(request)
        pending = deque(enumerate(requests))
        streams: dict[str, tuple[int, TextStream]] = {}
        try:
            with tqdm(total=len(requests), desc="generate", disable=not progress) as bar:
                while pending or streams:
                    self._admit(pending, streams)
                    for index, output in self._step(streams):
                        completions[index].add(output)
                        bar.update(output.finish_reason is not None)
        finally:
            for request_id in streams:  # not empty after an error or Ctrl-C
                self.core.abort_request(request_id)
        return completions

    def _request(self, prompt: list[int], params: SamplingParams, cache_salt: str | None) -> AddRequest:
        self._count += 1
        return AddRequest(
            request_id=f"offline-{self._count}",
            prompt_token_ids=TokenIds(prompt),
            sampling_params=params,
            eos_token_ids=sorted(self.tokenizer.eos_token_ids),
            cache_salt=cache_salt,
        )

    def _admit(self, pending: deque[tuple[int, AddRequest]], streams: dict[str, tuple[int, TextStream]]) -> None:
        """Add pending requests until the engine's queue is full."""
        while pending and len(self.core.scheduler.waiting) < self.core.config.max_waiting:
            index, request = pending.popleft()
            self.core.add_request(request)
            text = TextStream(self.tokenizer, request.sampling_params, request.prompt_token_ids)
            streams[request.request_id] = (index, text)

    def _step(self, streams: dict[str, tuple[int, TextStream]]) -> Iterator[tuple[int, RequestOutput]]:
        for step in self.core.step():
            index, stream = streams[step.request_id]
            if step.error_code == "invalid":  # a grammar that does not compile; `check` cannot find it
                raise RequestError(step.error or "invalid", step.error_param)
            output = stream.push(step)
            if output.finish_reason is not None:
                del streams[step.request_id]
                self.core.abort_request(step.request_id)  # a stop string ends the answer before the engine does
            yield index, output


def _as_prompts(prompts: Prompt | list[Prompt]) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise TypeError(f"prompts must be a text, a list of token ids or a list of these, got {prompts!r:.80}")
    several: list[Any] = [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)
    for prompt in several:
        if not isinstance(prompt, str | list | tuple):
            raise TypeError(f"a prompt must be a text or a list of token ids, got {prompt!r:.80}")
    return several


def _as_conversations(conversations: Any) -> list[Any]:
    is_list = isinstance(conversations, list) and bool(conversations)
    several: list[Any] = conversations if is_list and isinstance(conversations[0], list) else [conversations]
    for messages in several:
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise TypeError(
                "a conversation must be a list of messages such as {'role': 'user', 'content': 'Hi'}, "
                f"got {messages!r:.80}"
            )
    return several


def _check_params(params: Any) -> None:
    for one in params if isinstance(params, list) else [params or SamplingParams()]:
        if not isinstance(one, SamplingParams):
            raise TypeError(f"params must be SamplingParams(max_tokens=...) or a list of them, got {one!r:.80}")
