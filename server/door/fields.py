"""Which body fields are served, which are refused by name, and which are left out.

A field that OpenAI, vLLM or SGLang documents and that is not implemented here is refused, unless its value asks for
nothing. An undocumented field (routers add some) is left out and named in a response header.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import UnsupportedParameterError

logger = logging.getLogger("leyden.server")

# These identify the client or the conversation; they change no answer.
ANNOTATIONS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "session_id"})

# Documented elsewhere, not implemented here -> the values that ask for nothing. null always does.
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
# Served on the other route only -> the values that ask for nothing on this one.
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

IGNORED_HEADER = "x-ignored-parameters"
MAX_IGNORED_NAMES = 32
MAX_IGNORED_CHARS = 160  # a path within a schema is long
MAX_TOLD_NAMES = 100
MAX_HEADER_CHARS = 2_048  # proxies bound a response's headers, some of them at 4,096 characters
INDEX = re.compile(r"\[\d+\]")
UNSAFE_NAME_CHARS = re.compile(r"[^A-Za-z0-9_.$\[\]-]")


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


def ignored_header(names: list[str]) -> dict[str, str]:
    """The response header that lists the fields left out; names come from users, so they are cut and cleaned."""
    if not names:
        return {}
    cleaned: list[str] = []
    for name in names[:MAX_IGNORED_NAMES]:
        cleaned.append(UNSAFE_NAME_CHARS.sub("?", name[:MAX_IGNORED_CHARS]))
        if len(", ".join(cleaned)) > MAX_HEADER_CHARS:
            cleaned.pop()
            break
    num_left = len(names) - len(cleaned)
    return {IGNORED_HEADER: ", ".join([*cleaned, f"and {num_left} more"] if num_left else cleaned)}


class IgnoredNames:
    """Warns once of each field that is left out: a header is easily overlooked, and `temperatur` changes no answer.

    Names come from users, so no more than `MAX_TOLD_NAMES` are told and kept.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, names: Iterable[str]) -> None:
        for name in names:
            shown = INDEX.sub("[]", name[:MAX_IGNORED_CHARS])
            if shown not in self._told and len(self._told) < MAX_TOLD_NAMES:
                self._told.add(shown)
                logger.warning("requests send %s, which is left out (told once; header %s)", shown, IGNORED_HEADER)
                if len(self._told) == MAX_TOLD_NAMES:
                    logger.warning("more fields that are left out are named in %s alone", IGNORED_HEADER)


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(map(json.dumps, values))
