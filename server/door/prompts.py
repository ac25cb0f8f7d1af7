"""Prompts in all their forms -> token ids. Long texts are tokenized in a thread, and streams go on meanwhile."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ...engine.errors import ContextLengthError, RequestError
from ...engine.messages import EngineInfo
from ...engine.text.token_ids import TokenIds
from ..errors import UnsupportedParameterError
from ..off_loop import MAX_CHARS_INLINE, off_loop
from ..state import ServerState
from ..wire.requests import ChatRequest, CompletionRequest, TokenizeRequest
from ..wire.schemas import INT32_MAX
from .body import json_type

MAX_CHARS_AT_ONCE = 65_536  # a longer text takes one of the places for long texts
IDS_PER_CHAR = 8  # ids that are read in the time of tokenizing one character
IDS_PER_CALL = 65_536
CHARS_PER_MESSAGE = 32  # the template's work on any message costs as much as so many characters


T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine gets it. `text` is for `echo`: of a prompt of token ids it is empty without `echo`.

    `beginning`: tokens at the start that other prompts probably share, 0 if unknown.
    """

    token_ids: TokenIds
    text: str = ""
    beginning: int = 0


async def read_prompts(request: CompletionRequest, state: ServerState) -> list[Prompt]:
    """The prompts of a completion request. Raises `RequestError`, or `ContextLengthError` for one that is too long."""
    return await tokenizing(_num_chars(request, state), state, lambda: _read_prompts(request, state))


def _num_chars(request: CompletionRequest, state: ServerState) -> int:
    """The cost of reading the prompts, in the unit of `off_loop`. Prompts beyond `max_prompts` are refused unread."""
    value = request.prompt
    if not isinstance(value, list):
        return len(value) if isinstance(value, str) else 0
    if not value or isinstance(value[0], int):
        value = [value]
    items = [item for item in value[: state.settings.max_prompts + 1] if isinstance(item, str | list)]
    return sum(len(item) if isinstance(item, str) or request.echo else len(item) // IDS_PER_CHAR for item in items)


def _read_prompts(request: CompletionRequest, state: ServerState) -> list[Prompt]:
    info = state.llm.client.info
    items = _as_prompt_list(request.prompt, state.settings.max_prompts, info)
    for index, item in enumerate(items):
        if isinstance(item, str):
            check_num_chars(len(item), state, _where(index, items))
    prompts = [_make_prompt(item, request, state) for item in items]
    for index, prompt in enumerate(prompts):
        check_prompt(prompt.token_ids, info, _where(index, items))
    return prompts


def _make_prompt(item: str | TokenIds, request: CompletionRequest, state: ServerState) -> Prompt:
    tokenizer = state.llm.tokenizer
    if isinstance(item, str):
        return Prompt(TokenIds(tokenizer.encode(item, request.add_special_tokens, request.parse_special)), item)
    text = tokenizer.decode(item.tolist(), request.skip_special_tokens) if request.echo else ""
    return Prompt(item, text)


def _where(index: int, items: list[Any]) -> str:
    return "prompt" if len(items) == 1 else f"prompt[{index}]"


def _as_prompt_list(value: Any, max_prompts: int, info: EngineInfo) -> list[str | TokenIds]:
    """The four forms of `prompt` -> one list of texts and token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _bad_prompt("an empty list" if value == [] else json_type(value), "prompt")
    if type(value[0]) is int:
        return [_as_token_ids(value, info, "prompt")]
    if len(value) > max_prompts:
        raise RequestError(
            f"prompt must have at most {max_prompts} entries (setting max_prompts), got {len(value)}", "prompt"
        )
    first = str if isinstance(value[0], str) else list
    items: list[str | TokenIds] = []
    for index, item in enumerate(value):
        where = f"prompt[{index}]" if len(value) > 1 else "prompt"
        if not isinstance(item, first):
            raise _bad_prompt(json_type(item), f"prompt[{index}]")
        items.append(_as_token_ids(item, info, where) if isinstance(item, list) else item)
    return items


def _as_token_ids(value: list[Any], info: EngineInfo, where: str) -> TokenIds:
    """Read in pieces of IDS_PER_CALL: each call holds Python's lock until it returns. Raises `RequestError`."""
    pieces = []
    for start in range(0, len(value), IDS_PER_CALL):
        piece = value[start : start + IDS_PER_CALL]
        if set(map(type, piece)) != {int}:
            index, item = next((i, item) for i, item in enumerate(piece) if type(item) is not int)
            raise _bad_prompt(json_type(item), f"{where}[{start + index}]")
        try:
            pieces.append(array("i", piece).tobytes())
        except OverflowError:
            raise _unknown_id(next(item for item in piece if abs(item) > INT32_MAX), info, where) from None
    ids = TokenIds(b"".join(pieces))
    check_token_ids(ids, info, where)
    return ids


def _bad_prompt(found: str, where: str) -> RequestError:
    forms = "a string, a list of strings, a list of token ids or a list of such lists"
    return RequestError(f"prompt must be {forms}; {where} is {found}", where)


async def encode_messages(
    request: ChatRequest | TokenizeRequest,
    state: ServerState,
    tools: list[dict[str, Any]] | None,
    template_kwargs: dict[str, Any],
) -> Prompt:
    """A conversation, laid out by the chat template.

    `request.messages` come from `messages.read_messages`, `tools` from `tools.read_tools`, `template_kwargs` from
    `template_settings.read_settings`. Raises `RequestError`, also when the template refuses the messages.
    """
    tokenizer = state.llm.tokenizer
    if not tokenizer.has_chat_template:
        raise RequestError(
            "this checkpoint has no chat template; use /v1/completions, or start the server with --chat-template FILE",
            "messages",
        )
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )
    add_generation_prompt = request.add_generation_prompt
    if add_generation_prompt is None:
        add_generation_prompt = not request.continue_final_message
    for name in ("add_special_tokens", "parse_special"):  # fields of /tokenize
        if getattr(request, name, None):
            raise UnsupportedParameterError(
                f"{name} is not supported with messages: control tokens come from the chat template", name
            )
    has_objects = tools or any("tool_calls" in message for message in request.messages)
    num_chars = sum(len(text) for message in request.messages for text in message.values() if isinstance(text, str))
    check_num_chars(num_chars, state, "messages")

    def encode() -> Prompt:
        ids, beginning = tokenizer.encode_conversation(
            request.messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tools=tools or None,
            template_kwargs=template_kwargs,
        )
        return Prompt(TokenIds(ids), beginning=beginning)

    cost = num_chars + CHARS_PER_MESSAGE * len(request.messages)
    return await tokenizing(max(cost, MAX_CHARS_INLINE + 1) if has_objects else cost, state, encode)


async def tokenizing(num_chars: int, state: ServerState, work: Callable[[], T]) -> T:
    """`off_loop` with a bound on long texts at once, so that processors are left for short texts and other work."""
    if num_chars <= MAX_CHARS_AT_ONCE:
        return await off_loop(num_chars, work)
    async with state.long_texts:
        return await off_loop(num_chars, work)


def check_token_ids(ids: TokenIds, info: EngineInfo, where: str) -> None:
    """Raises `RequestError` naming the first id that is not in the vocabulary. `where`: the field they come from."""
    if (bad := ids.first_outside(info.vocab_size)) is not None:
        raise _unknown_id(bad, info, where)


def _unknown_id(token_id: int, info: EngineInfo, where: str) -> RequestError:
    return RequestError(f"{where} must be token ids in [0, {info.vocab_size}), got {token_id}", where)


def check_can_be_admitted(num_prompts: int, n: int, info: EngineInfo) -> None:
    """Raises `RequestError` for more choices than the engine can hold: those of a request are admitted together."""
    bound = info.num_state_slots + info.max_waiting
    if num_prompts * n > bound:
        name = "n" if n > bound else "prompt"
        raise RequestError(
            f"{num_prompts} prompts times n = {n} make {num_prompts * n} sequences, and this server holds no more than "
            f"{bound} (max_num_seqs + max_waiting); send fewer at once",
            name,
        )


def check_num_chars(num_chars: int, state: ServerState, where: str) -> None:
    """Raises `ContextLengthError` for a text that would not fit even in tokens of the greatest length.

    Asked before the text is tokenized, so that a text far too long costs nothing.
    """
    info, longest = state.llm.client.info, state.llm.tokenizer.max_token_chars
    if num_chars > info.max_model_len * longest:
        raise ContextLengthError(
            f"{where}: {num_chars} characters are too many; the context length is {info.max_model_len} tokens of at "
            f"most {longest} characters",
            where,
        )


def check_prompt(ids: TokenIds, info: EngineInfo, where: str) -> None:
    """Raises `RequestError` for an empty prompt, `ContextLengthError` for one beyond the context length."""
    if not ids:
        raise RequestError(f"{where} must have at least one token", where)
    if len(ids) > info.max_model_len:
        raise ContextLengthError(
            f"{where}: {len(ids)} tokens are too many; the context length is {info.max_model_len}", where
        )
