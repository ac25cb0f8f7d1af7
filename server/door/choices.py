"""Typed requests -> choices: for each answer the `AddRequest` that the engine gets, built here once."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ...engine.errors import ContextLengthError, RequestError
from ...engine.messages import AddRequest, EngineInfo
from ...engine.sampling_params import SamplingParams
from ..parsers.formats import AnswerFormat
from ..state import ServerState
from ..wire.requests import GenerationRequest
from .answer_grammar import Form
from .body import MAX_SHOWN_CHARS
from .prompts import Prompt

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
PLAIN = AnswerFormat()


class AnswerLength(NamedTuple):
    """Tokens that an answer may have: `asked` in the request's field `name`, or up to `default`; None: what fits."""

    name: str
    asked: int | None
    default: int | None = None


class Scores(NamedTuple):
    """How many alternatives come with the log-probabilities of each token; None: no log-probabilities."""

    answer: int | None = None
    prompt: int | None = None


@dataclass(frozen=True)
class Choice:
    """One answer to generate. `index` = prompt_index * n + its number among the n choices of the prompt.

    `answer` says how its text is read. `form_field` is the request's field that the grammar was made of.
    """

    index: int
    prompt_index: int
    request: AddRequest
    answer: AnswerFormat = PLAIN
    form_field: str = "grammar"

    @property
    def is_first(self) -> bool:
        """Whether the prompt's other choices copy what this one computes of it."""
        return self.request.sibling_of is None


def make_choices(
    request: GenerationRequest,
    state: ServerState,
    prompts: list[Prompt],
    length: AnswerLength,
    scores: Scores,
    answer: AnswerFormat = PLAIN,
    form: Form | None = None,
) -> list[Choice]:
    """The choices of a request, `n` for each prompt, with what the engine is to be told of each.

    A sampling parameter is the request's, else the checkpoint's default, else OpenAI's. The first choice of a prompt
    leads the others as siblings. Raises `ContextLengthError` for a length that does not fit behind a prompt, and
    `RequestError` for too many log-probabilities, a bad `logit_bias` or a session of several choices.
    """
    fields = _sampling_fields(request, state)
    fields |= {"logprobs": scores.answer, "prompt_logprobs": scores.prompt, "grammar": form and form.grammar}
    session_id = _session_of(request, len(prompts), state.llm.client.info)
    eos_token_ids = sorted(state.llm.tokenizer.eos_token_ids)
    max_scored = _fit_scores(request.n, prompts, state.settings.max_scores, length, scores)
    key = uuid.uuid4().hex
    choices = []
    for prompt_index, prompt in enumerate(prompts):
        num_left = state.llm.client.info.max_model_len - len(prompt.token_ids)
        max_tokens = _fit_context(length, len(prompt.token_ids), num_left)
        fields["max_tokens"] = max_tokens if max_scored is None else min(max_tokens, max_scored)
        params = SamplingParams(**fields, seed=request.seed)
        first = prompt_index * request.n
        for number in range(request.n):
            added = AddRequest(
                request_id=f"{key}-{first + number}",
                prompt_token_ids=prompt.token_ids,
                sampling_params=params.choice(number),
                priority=request.priority,
                eos_token_ids=eos_token_ids,
                max_queue_seconds=state.settings.max_queue_seconds,
                prefix_cache=request.prefix_cache,
                cache_salt=request.cache_salt,
                beginning=prompt.beginning,
                session_id=session_id,
                num_siblings=0 if number else request.n - 1,
                sibling_of=f"{key}-{first}" if number else None,
            )
            choice = Choice(first + number, prompt_index, added, answer)
            choices.append(choice if form is None else replace(choice, form_field=form.field))
    return choices


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


def _fit_scores(n: int, prompts: list[Prompt], bound: int, length: AnswerLength, scores: Scores) -> int | None:
    """How many tokens an answer may have so that the log-probabilities of all choices, which are held until they are
    sent, stay within `bound`; None without log-probabilities of the answer. Only a length that was asked for can be an
    error."""
    num_fixed = 0
    if scores.prompt is not None:
        num_fixed = n * sum(len(prompt.token_ids) for prompt in prompts) * (scores.prompt + 1)
    per_token = 0 if scores.answer is None else n * len(prompts) * (scores.answer + 1)
    name, value = length.name, length.asked
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


def _fit_context(length: AnswerLength, num_prompt: int, num_left: int) -> int:
    """How many tokens may follow the prompt. Only a length that was asked for can be an error, or a full context."""
    name, value = length.name, length.asked
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
    return num_left if length.default is None else min(length.default, num_left)
