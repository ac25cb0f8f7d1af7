"""A request's values for the chat template: `reasoning_effort` and `chat_template_kwargs`, where the template reads
them."""

from __future__ import annotations

import json
from typing import Any

from ...engine.errors import RequestError
from ...engine.text.template_inputs import TemplateInputs
from ..wire.schemas import Effort
from .body import MAX_SHOWN_CHARS, drop_nulls

MAX_SETTINGS = 32
MAX_SETTINGS_CHARS = 16_384  # of all settings together, as JSON
FIELD = "chat_template_kwargs"
SWITCHES = ("enable_thinking", "thinking")  # Qwen's, Ling's and GLM's; Granite's and DeepSeek's
# An effort -> the names that templates may have for it, the best first. Some refuse all but three of these names.
WORDS: dict[Effort, tuple[str, ...]] = {
    "none": ("none", "minimal", "low"),
    "minimal": ("minimal", "low"),
    "low": ("low", "minimal"),
    "medium": ("medium",),
    "high": ("high", "xhigh", "max"),
    "xhigh": ("xhigh", "max", "high"),
    "max": ("max", "xhigh", "high"),
}


def read_settings(
    effort: Effort | None, settings: dict[str, Any], inputs: TemplateInputs
) -> tuple[dict[str, Any], list[str]]:
    """(values for the template, names of settings that the template does not read). `settings` win over `effort`.

    Raises `RequestError` for a name that the renderer reserves, for too many settings and for too long ones.
    """
    settings = drop_nulls(settings)
    if len(settings) > MAX_SETTINGS:
        raise RequestError(f"{FIELD} must have at most {MAX_SETTINGS} entries, got {len(settings)}", FIELD)
    num_chars = len(json.dumps(settings, ensure_ascii=False))
    if num_chars > MAX_SETTINGS_CHARS:
        raise RequestError(f"{FIELD} must have at most {MAX_SETTINGS_CHARS} characters as JSON, got {num_chars}", FIELD)
    for name in settings:
        if name in inputs.reserved:
            raise RequestError(f"{FIELD}.{name[:MAX_SHOWN_CHARS]} is not for a request to set; leave it out", FIELD)
    known = {name: value for name, value in settings.items() if name in inputs.settings}
    unread = [f"{FIELD}.{name}" for name in settings if name not in known]
    of_effort = {} if effort is None else _of_effort(effort, inputs)
    if effort is not None and not of_effort:
        unread.append("reasoning_effort")
    return of_effort | known, unread


def _of_effort(effort: Effort, inputs: TemplateInputs) -> dict[str, Any]:
    found: dict[str, Any] = {name: effort != "none" for name in SWITCHES if name in inputs.settings}
    if "reasoning_effort" in inputs.settings and not (effort == "none" and found):
        found["reasoning_effort"] = next((word for word in WORDS[effort] if word in inputs.words), effort)
    return found
