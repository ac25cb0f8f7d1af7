"""Text to token ids and back, by the checkpoint's own tokenizer and chat template.

Text of a user never becomes a control token, unless the caller asks for it: the string `<|end|>` in a prompt or a
message is encoded as text. Control tokens come from the chat template, or as token ids.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import secrets
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from ...configs.schema import EngineConfig
from ...models.families.registry import read_config
from ...models.loading.checkpoint import GENERATION_FILE, read_generation_config, resolve
from ..errors import CheckpointError, RequestError
from ..sampling_params import SamplingParams
from .template_inputs import TemplateInputs, template_inputs
from .tokenizer_files import load_tokenizer

logger = logging.getLogger("leyden.engine")

MANY_IDS = 1024
MAX_CHANGED = 4  # leading tokens of a text that may differ when another text precedes it
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Tokenizer:
    """A fast Hugging Face tokenizer with its chat template. Thread-safe; no code of the checkpoint is run."""

    def __init__(self, folder: Path, tokenizer: Path | None = None, chat_template: Path | None = None) -> None:
        """folder: the checkpoint. tokenizer: another folder, whose tokenizer and template replace the checkpoint's.
        chat_template: a file that replaces the template.

        Raises `CheckpointError` if no tokenizer works without the folder's own code, or a template is broken.
        """
        config = read_config(folder)
        from tokenizers import Tokenizer as Backend

        self._hf: Any = load_tokenizer(tokenizer or folder, chat_template)
        source = self._hf.backend_tokenizer.to_str()
        self._with_control: Any = Backend.from_str(source)
        self._as_text: Any = Backend.from_str(source)
        self._as_text.encode_special_tokens = True
        added = self._hf.added_tokens_decoder
        # Text -> id of the added tokens: control tokens, and visible markers such as <think>.
        self.added_ids: dict[str, int] = {token.content: i for i, token in added.items()}
        special = {i: token.content for i, token in added.items() if token.special}
        controls, self.control_ids = list(special.values()), frozenset(special)
        self._control_start = _start_of_any(controls)
        self._control_prefixes = {token[:n] for token in controls for n in range(1, len(token))}
        self._max_prefix = max(map(len, self._control_prefixes), default=0)
        self._decode_one = cache(self._decode)  # never more entries than twice the vocabulary
        self._decode_inside = cache(self._decode_behind)  # never more entries than the vocabulary
        self._neighbours = _encode(self._as_text, "a", False)
        self.max_token_chars = max(map(len, self._with_control.get_vocab(with_added_tokens=True)), default=1)
        self.vocab_size = int(self._with_control.get_vocab_size(with_added_tokens=True))
        self.model_vocab_size = config.vocab_size  # the model's logits: not fewer than `vocab_size`, often more
        self.bos_token_id: int | None = self._hf.bos_token_id
        own_eos = () if self._hf.eos_token_id is None else (self._hf.eos_token_id,)
        self.eos_token_ids = frozenset(own_eos) | frozenset(config.eos_token_ids)
        self.default_sampling = _default_sampling(folder)

    @classmethod
    def of(cls, config: EngineConfig) -> Tokenizer:
        """The tokenizer that the settings name. Raises `CheckpointError`, also for ids that the model does not have."""
        folder = resolve(config.model, config.revision, weights=False)
        made = cls(folder, config.tokenizer, config.chat_template)
        if config.tokenizer is not None and made.vocab_size > made.model_vocab_size:
            raise CheckpointError(
                f"the tokenizer in {config.tokenizer} has {made.vocab_size} tokens, the model {made.model_vocab_size}; "
                "give the tokenizer of this model by --tokenizer, or leave it out"
            )
        return made

    def for_grammars(self) -> Any:
        """The vocabulary as an llguidance tokenizer, with one id per logit of the model. Takes up to a second.

        Raises `CheckpointError` if llguidance cannot use it.
        """
        from llguidance.hf import from_tokenizer

        # A tokenizer without an end-of-text token ends answers with a control token, which is not shown.
        ends = sorted(self.eos_token_ids) or sorted(self.control_ids)[:1]
        if not ends:
            raise CheckpointError("this checkpoint has no token that could end an answer (eos_token_id in config.json)")
        try:
            return from_tokenizer(self._hf, n_vocab=self.model_vocab_size, eos_token=ends)
        except ValueError as error:
            raise CheckpointError(f"this checkpoint's tokenizer does not suit llguidance: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    @property
    def chat_template(self) -> str:
        """The text of the template, or of all templates if there are several."""
        template = self._hf.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    @cached_property
    def template_inputs(self) -> TemplateInputs:
        """The arguments that the template reads, or that any of several templates reads."""
        template = self._hf.chat_template or ""
        sources = template.values() if isinstance(template, dict) else [template]
        arguments = inspect.signature(self._hf.apply_chat_template).parameters
        return template_inputs(sources, [*arguments, *self._hf.special_tokens_map])

    @property
    def takes_tools(self) -> bool:
        """The chat template has a place for tools."""
        return "tools" in self.chat_template

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of a text.

        add_special_tokens: add the tokens that the checkpoint puts around a prompt (often a bos). parse_special: encode
        a control token that the text spells as that token; not for untrusted text.
        """
        return _encode(self._with_control if parse_special else self._as_text, text, add_special_tokens)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, rendered by the checkpoint's template in transformers' immutable sandbox.

        Raises `RequestError` when there is no template, it refuses the messages, or it has no place for `tools`.
        """
        text, marker = self._render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=template_kwargs or {},
        )
        return self._encode_rendered(text, marker)

    def encode_conversation(self, messages: list[dict[str, Any]], **settings: Any) -> tuple[list[int], int]:
        """`encode_chat`, and the number of tokens before the last message's text: a system prompt and tools, with which
        other conversations probably begin too. The number is 0 if the conversation has answers."""
        defaults: dict[str, Any] = {"add_generation_prompt": True, "continue_final_message": False, "tools": None}
        text, marker = self._render(messages, **{**defaults, "template_kwargs": {}, **settings})
        ids = self._encode_rendered(text, marker)
        said = self._defuse(messages[-1].get("content"), marker)
        has_answers = any(message.get("role") == "assistant" for message in messages)
        at = text.rfind(said) if said and isinstance(said, str) and not has_answers else -1
        return ids, self._num_beginning(ids, text, at, marker) if at > 0 else 0

    def _num_beginning(self, ids: list[int], text: str, at: int, marker: str) -> int:
        """The number of `ids`, the tokens of rendered text, before the text's character `at`, minus one: the last of
        them may differ if another text follows. 0 if the number cannot be found.

        Tokenizes only the shorter side of `at` again. Caches nothing, so no caller waits for another.
        """
        if 2 * at <= len(text):
            return max(len(self._encode_rendered(text[:at], marker)) - 1, 0)
        rest = self._encode_rendered(text[at:], marker)
        start = len(ids) - len(rest)
        for num_changed in range(MAX_CHANGED + 1):
            if ids[start + num_changed :] == rest[num_changed:]:
                return max(start - num_changed - 1, 0)
        return 0

    def _render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: list[dict[str, Any]] | None,
        template_kwargs: dict[str, Any],
    ) -> tuple[str, str]:
        """(the rendered text, with a marker inside each control token that a user's text spells; the marker)."""
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; give one (setting chat_template), or prompts instead of messages",
                "messages",
            )
        if tools and not self.takes_tools:
            raise RequestError("this model's chat template does not use tools; leave them out", "tools")
        for name in template_kwargs:
            if name in self.template_inputs.reserved:
                raise RequestError(f"{name!r} is not an argument of the chat template", "chat_template_kwargs")
        marker = _marker()
        defused = self._defuse(messages, marker)
        if self._takes_one_system:
            defused = _with_one_system(defused)
        if self._wants_parts:
            defused = [_with_parts(message) for message in defused]
        defused = [self._with_fitting_arguments(message) for message in defused]
        try:
            text = self._hf.apply_chat_template(
                defused,
                tools=self._defuse(tools, marker),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **self._defuse(template_kwargs, marker),
            )
        except TemplateError as error:  # including errors that a template raises on purpose
            raise RequestError(f"the chat template refused the messages: {error}", "messages") from error
        except Exception as error:  # a template is a program and may raise any error
            logger.exception("the chat template failed")
            raise RequestError("the chat template failed on these messages", "messages") from error
        return text, marker

    def _encode_rendered(self, text: str, marker: str) -> list[int]:
        """The token ids of the text that `_render` returned, cut at the markers. Halves of a control token are plain
        text."""
        ids: list[int] = []
        for piece in text.split(marker):
            ids += _encode(self._with_control, piece, False)
        return ids

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads content only as [{"type": "text", "text": ...}], and renders a string as
        nothing."""
        probe = {"role": "user", "content": "probe"}
        return "probe" not in self._probe(probe) and "probe" in self._probe(_with_parts(probe))

    @cached_property
    def _takes_one_system(self) -> bool:
        """Whether the template refuses a second system message next to the first. Agents send several."""
        system, user = {"role": "system", "content": "probe"}, {"role": "user", "content": "u"}
        return bool(self._probe(system, user)) and not self._probe(system, system, user)

    def _with_fitting_arguments(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with the arguments of its calls in the form that the template takes (`_wants_arguments`)."""
        calls = message.get("tool_calls")
        if not calls:
            return message
        functions = [call["function"] for call in calls]
        fitting = [function | {"arguments": self._fit(function["arguments"])} for function in functions]
        pairs = zip(calls, fitting, strict=True)
        return message | {"tool_calls": [call | {"function": function} for call, function in pairs]}

    def _fit(self, arguments: dict[str, Any] | str) -> dict[str, Any] | str:
        if isinstance(arguments, str):
            return {"arguments": arguments} if self._wants_arguments == "objects" else arguments
        return json.dumps(arguments, ensure_ascii=False) if self._wants_arguments == "text" else arguments

    @cached_property
    def _wants_arguments(self) -> Literal["objects", "text", "either"]:
        """The form in which the template takes the arguments of tool calls. Some templates refuse arguments as text;
        others print them unchanged, so they must be JSON text."""
        text = '{"probe": "value"}'
        as_text, as_object = self._probe(*_call(text)), self._probe(*_call(json.loads(text)))
        if "probe" in as_object and "'probe'" not in as_object:  # not printed as a Python dict
            return "either" if "probe" in as_text else "objects"
        return "text" if text in as_text else "either"

    def _probe(self, *messages: dict[str, Any]) -> str:
        try:
            return str(self._hf.apply_chat_template(list(messages), tokenize=False))
        except Exception:  # the template refuses this conversation
            return ""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that form no character become U+FFFD."""
        if len(ids) == 1:  # cached: a stream decodes every token alone, too
            return self._decode_one(ids[0], skip_special_tokens)
        if len(ids) > MANY_IDS:  # a batch releases Python's lock while it decodes
            return str(self._with_control.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])
        return str(self._with_control.decode(ids, skip_special_tokens=skip_special_tokens))

    def _decode(self, token_id: int, skip_special_tokens: bool) -> str:
        return str(self._with_control.decode([token_id], skip_special_tokens=skip_special_tokens))

    def _decode_behind(self, token_id: int) -> str:
        text, before = (self.decode(ids, False) for ids in ([*self._neighbours, token_id], self._neighbours))
        return text[len(before) :] if text.startswith(before) else self._decode_one(token_id, False)

    def token_text(self, token_id: int) -> str:
        """The text of one token, also of a control token, as in the middle of a text. At the beginning of a text it may
        lose its blank."""
        return self._decode_one(token_id, False) if token_id in self.control_ids else self._decode_inside(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, also if they are only a part of a character."""
        text = self.token_text(token_id)
        if "�" not in text:
            return text.encode()
        piece = self._with_control.id_to_token(token_id) or ""
        if fallback := _BYTE_FALLBACK.fullmatch(piece):  # first: all its characters are in _BYTE_OF_CHAR too
            return bytes([int(fallback[1], 16)])
        if all(char in _BYTE_OF_CHAR for char in piece):
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        return text.encode()

    def _defuse(self, value: Any, marker: str) -> Any:
        """The value with the marker inside every control token that its strings spell. A string that ends like the
        beginning of a control token gets the marker at its end, because the template's next text could complete it."""
        if isinstance(value, str):
            value = self._control_start.sub(lambda found: found[0] + marker, value)
            return value + marker if self._ends_in_control_prefix(value) else value
        if isinstance(value, dict):
            return {self._defuse(key, marker): self._defuse(entry, marker) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._defuse(entry, marker) for entry in value]
        return value

    def _ends_in_control_prefix(self, text: str) -> bool:
        # Words get no marker: templates compare them ("user", "text"), and control tokens rarely begin with a letter.
        ends = (text[-n:] for n in range(1, self._max_prefix + 1))
        return any(end in self._control_prefixes and not end[0].isalnum() for end in ends)


def _default_sampling(folder: Path) -> dict[str, float | int]:
    """Sampling defaults of generation_config.json. Raises `CheckpointError` for values that no request may have."""
    generation = read_generation_config(folder)
    if generation.get("do_sample") is False:
        return {}
    given = {name: generation[name] for name in _SAMPLING_FIELDS if generation.get(name) is not None}
    try:
        SamplingParams(**given)
    except RequestError as error:
        raise CheckpointError(f"{folder / GENERATION_FILE}: {error}") from None
    return given


def _encode(backend: Any, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of `text`, encoded in a batch of one: `encode` would hold Python's lock and stop every other thread."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system messages at the beginning as one, which is where a template wants them all."""
    first = list(takewhile(lambda message: message.get("role") == "system", messages))
    if len(first) < 2 or not all(isinstance(message.get("content"), str) for message in first):
        return messages
    joined = first[0] | {"content": "\n\n".join(message["content"] for message in first)}
    return [joined, *messages[len(first) :]]


def _call(arguments: Any) -> list[dict[str, Any]]:
    """A conversation with a call of these arguments."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _start_of_any(tokens: list[str]) -> re.Pattern[str]:
    """A pattern that matches the first character of every occurrence of a token, overlapping ones too.

    Each branch begins with a plain character: `re` then skips to the next one of these, a hundred times as fast, which
    matters because a search holds Python's lock to its end.
    """
    rests: dict[str, list[str]] = {}
    for token in sorted(filter(None, tokens)):
        rests.setdefault(token[0], []).append(re.escape(token[1:]))
    branches = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
    return re.compile("|".join(branches) or r"(?!)")


def _marker() -> str:
    """A random string of digits. No client can guess it, so no request holds it. Templates change no digits."""
    return f"{secrets.randbelow(10**30):030d}"


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character -> byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()
_BYTE_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")  # SentencePiece's token of one byte
