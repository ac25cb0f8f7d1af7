"""Sorts the fields of a body: served, refused by name, or left out.

A field that OpenAI, vLLM or SGLang documents and that is not implemented here is refused, unless its value asks for
nothing. An undocumented field (routers add some) is left out and named in a response header.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import UnsupportedParameterError

# Fields that identify the client or the conversation. They change no answer.
ANNOTATIONS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "session_id"})

# Fields documented elsewhere and not implemented here -> their values that ask for nothing. null always does.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    # OpenAI, completions
    "best_of": (1,),
    "suffix": ("",),
    # OpenAI, chat
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM, both
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "early_stopping": (False,),
    "ec_transfer_params": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "request_id": (),
    "return_mm_kwargs": (True, False),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "structural_tag": (),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    # SGLang
    "custom_logit_processor": (),
    "ebnf": (),
    "json_schema": (),
    "lora_path": (),
    "no_stop_trim": (False,),
    "regex": (),
    "return_hidden_states": (False,),
    "separate_reasoning": (True,),
    "session_params": (),
    "stop_regex": (),
    "stream_reasoning": (True,),
}
# Fields that only the other route serves -> their values that ask for nothing on this one.
FOREIGN_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "parallel_tool_calls": (True, False),
    "parse_special": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True, False),
    "reasoning_effort": (),
    "stop_in_reasoning": (True, False),  # a completion is one text
}


def split_fields(
    body: dict[str, Any],
    served: Iterable[str],
    foreign: Iterable[str] = (),
    neutral_values: Mapping[str, tuple[Any, ...]] = NEUTRAL_VALUES,
) -> tuple[dict[str, Any], list[str]]:
    """Body fields without nulls -> (the served ones, the names of undocumented ones).

    `foreign` are the fields that another route serves. Raises `UnsupportedParameterError` naming the first field that
    is documented, not served here, and asks for something.
    """
    served, foreign = set(served), set(foreign)
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in body.items():
        if name in served:
            known[name] = value
        elif name in neutral_values or name in foreign:
            neutral = neutral_values.get(name, FOREIGN_NEUTRAL_VALUES.get(name, ()))
            refuse_unless_neutral(name, value, neutral)
        elif name not in ANNOTATIONS:
            unknown.append(name)
    return known, unknown


def refuse_unless_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if any(type(value) is type(allowed) and value == allowed for allowed in neutral):
        return
    remedy = f"leave it out or send {_listed(neutral)}" if neutral else "leave it out"
    raise UnsupportedParameterError(f"{name} is not supported here; {remedy}", name)


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(map(json.dumps, values))
