"""Typed requests -> `SamplingParams`, one per choice: request over checkpoint's default over OpenAI's default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...engine.errors import ContextLengthError, RequestError
from ...engine.messages import EngineInfo
from ...engine.sampling_params import SamplingParams
from ...engine.text.detokenizer import StopScope
from ...engine.text.token_ids import TokenIds
from ..parsers.formats import AnswerFormat
from ..state import ServerState
from ..wire.requests import GenerationRequest
from .answer_grammar import Form
from .prompts import Prompt

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
MAX_SHOWN_CHARS = 80
PLAIN = AnswerFormat()


@dataclass(frozen=True)
class Job:
    """One choice to generate. `index` = prompt_index * n + its number among the n."""

    index: int
    prompt_index: int
    prompt_token_ids: TokenIds
    params: SamplingParams
    priority: int
    n: int  # choices of this prompt
    shown_ids: frozenset[int] = frozenset()  # control tokens that are text even where `params` hide them
    prefix_cache: bool = True
    cache_salt: str | None = None
    beginning: int = 0  # tokens with which other prompts are likely to begin, too
    form_field: str = "grammar"  # of the request, which the grammar in `params` was made of
    session_id: str | None = None  # under which its end can be saved
    stop_scope: Callable[[], StopScope | None] = lambda: None  # of each answer; None: stop strings count everywhere

    @property
    def first_index(self) -> int:
        """Of the prompt's choices."""
        return self.prompt_index * self.n


def make_jobs(
    request: GenerationRequest,
    state: ServerState,
    prompts: list[Prompt],
    *,
    asked: tuple[str, int | None],
    default_max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    answer: AnswerFormat = PLAIN,
    form: Form | None = None,
) -> list[Job]:
    fields = _sampling_fields(request, state)
    fields |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs, "grammar": form and form.grammar}
    session_id = _session_of(request, len(prompts), state.llm.client.info)
    jobs = []
    max_scored = _fit_scores(request.n, prompts, state.settings.max_scores, logprobs, prompt_logprobs, asked)
    for prompt_index, prompt in enumerate(prompts):
        num_left = state.llm.client.info.max_model_len - len(prompt.token_ids)
        max_tokens = _fit_context(asked, default_max_tokens, len(prompt.token_ids), num_left)
        fields["max_tokens"] = max_tokens if max_scored is None else min(max_tokens, max_scored)
        params = SamplingParams(**fields, seed=request.seed)
        for j in range(request.n):
            job = Job(
                index=prompt_index * request.n + j,
                prompt_index=prompt_index,
                prompt_token_ids=prompt.token_ids,
                params=params.choice(j),
                priority=request.priority,
                n=request.n,
                shown_ids=answer.shown_ids,
                prefix_cache=request.prefix_cache,
                cache_salt=request.cache_salt,
                beginning=prompt.beginning,
                session_id=session_id,
                stop_scope=answer.stop_scope,
            )
            jobs.append(job if form is None else replace(job, form_field=form.field))
    return jobs


def _session_of(request: GenerationRequest, num_prompts: int, info: EngineInfo) -> str | None:
    """A session is one conversation. Where there are none, the id only says who asks."""
    if request.session_id is None or not info.has_sessions:
        return None
    if num_prompts * request.n > 1:
        raise RequestError(
            f"session_id needs one prompt and n = 1, got {num_prompts} and {request.n}: a session is one conversation",
            "session_id",
        )
    return request.session_id


def _sampling_fields(request: GenerationRequest, state: ServerState) -> dict[str, Any]:
    """Everything of `SamplingParams` but seed, length and logprobs: request over checkpoint over OpenAI's default."""
    fields: dict[str, Any] = {
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": _read_logit_bias(request.logit_bias, state.llm.client.info),
        "min_tokens": request.min_tokens,
        "stop": tuple(request.stop),
        "stop_token_ids": tuple(request.stop_token_ids),
        "include_stop_str_in_output": request.include_stop_str_in_output,
        "ignore_eos": request.ignore_eos,
        "skip_special_tokens": request.skip_special_tokens,
    }
    defaults = state.llm.tokenizer.default_sampling if state.settings.generation_defaults else {}
    for name in SAMPLING_DEFAULTS:
        value = getattr(request, name)
        value = defaults.get(name) if value is None else value
        if value is not None:
            fields[name] = value
    return fields


def _read_logit_bias(bias: dict[str, float] | None, info: EngineInfo) -> dict[int, float] | None:
    if not bias:
        return None
    found = {}
    for key, value in bias.items():
        is_id = key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < info.vocab_size
        if not is_id:
            raise RequestError(
                f"logit_bias keys must be token ids in [0, {info.vocab_size}), got {key[:MAX_SHOWN_CHARS]!r}",
                "logit_bias",
            )
        found[int(key)] = value
    return found


def _fit_scores(
    n: int,
    prompts: list[Prompt],
    bound: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    asked: tuple[str, int | None],
) -> int | None:
    """How many tokens an answer may have so that the log-probabilities of all choices, which are held until they are
    sent, stay within `bound`; None where none are asked for. Only an explicit wish that does not fit is an error."""
    name, value = asked
    num_fixed = 0
    if prompt_logprobs is not None:
        num_fixed = n * sum(len(prompt.token_ids) for prompt in prompts) * (prompt_logprobs + 1)
    per_token = 0 if logprobs is None else n * len(prompts) * (logprobs + 1)
    total = num_fixed + (1 if value is None else value) * per_token
    if total > bound:
        fits_when_shorter = value is not None and num_fixed + per_token <= bound
        raise RequestError(
            f"{'the request' if value is None else f'{name} {value}'} asks for {total} log-probabilities, those of "
            f"alternatives, prompts and all choices included; at most {bound} are taken (setting max_scores). Ask for "
            "fewer alternatives, tokens or choices, or send less at once",
            name if fits_when_shorter else "logprobs",
        )
    return (bound - num_fixed) // per_token if per_token else None


def _fit_context(asked: tuple[str, int | None], default: int | None, num_prompt: int, num_left: int) -> int:
    """How many tokens may follow the prompt. Only an explicit wish that does not fit is an error."""
    name, value = asked
    if value is not None and value > num_left:
        raise ContextLengthError(
            f"{num_prompt} prompt tokens and {name} {value} exceed the context length of {num_prompt + num_left}; "
            f"shorten the prompt or ask for at most {num_left} tokens",
            name,
        )
    if value is not None:
        return value
    if num_left == 0:
        raise ContextLengthError(
            f"{num_prompt} prompt tokens fill the context length of {num_prompt}; no room is left to answer. "
            "Shorten the prompt",
            name,
        )
    return num_left if default is None else min(default, num_left)
