"""The format in which answers to a chat request are read, and the tools that the model is shown."""

from __future__ import annotations

from typing import Any

from ...engine.text.grammar import require as require_grammars
from ...engine.text.token_ids import TokenIds
from ..errors import UnsupportedParameterError
from ..parsers import reasoning
from ..parsers.formats import AnswerFormat, ThoughtState
from ..state import ServerState
from ..wire.requests import ChatRequest
from .tools import read_tool_choice

TAIL_TOKENS = 32  # enough for a marker and white space with any tokenizer


def offered_tools(request: ChatRequest, state: ServerState) -> list[dict[str, Any]]:
    """The tools that the model is shown; none if it must not call any. Raises `RequestError`."""
    choice = read_tool_choice(request.tool_choice, request.tools or [])
    if choice.mode == "none" or request.tools is None:
        return []
    if state.chat_format.tools is None:
        raise UnsupportedParameterError(f"tools are not supported with this model: {_why_no_tools(state)}", "tools")
    if choice.mode == "required":
        require_grammars("tool_choice")
    tools: list[dict[str, Any]] = request.tools
    return tools


def _why_no_tools(state: ServerState) -> str:
    if not state.llm.tokenizer.takes_tools:  # no parser helps where the template shows no tools
        return "its chat template does not use them; leave them out"
    if state.settings.tool_call_parser == "none":
        return "tool_call_parser is none; leave them out, or start with another one"
    unknown = "its chat template shows no format of calls that is known here"
    return f"{unknown}; leave them out, or set tool_call_parser at start"


def answer_format(
    request: ChatRequest, state: ServerState, prompt: TokenIds, tools: list[dict[str, Any]]
) -> AnswerFormat:
    """`tools`: those that the model is shown (`offered_tools`)."""
    return state.chat_format.of_answer(
        tools=tools,
        thought=_thought_at_end(request, state, prompt),
        max_calls=1 if _takes_one_call(request) else None,
        hides=request.skip_special_tokens,
        stops_in_thought=request.stop_in_reasoning,
    )


def _takes_one_call(request: ChatRequest) -> bool:
    """Whether the answer may have one call only. As with OpenAI a function that the request names is called once."""
    return not request.parallel_tool_calls or isinstance(request.tool_choice, dict)


def _thought_at_end(request: ChatRequest, state: ServerState, prompt: TokenIds) -> ThoughtState:
    """The state of the thought where the prompt ends, or where an answer that is to be continued ends."""
    if request.continue_final_message:
        _, opening, thought = request.messages[-1]["content"].rpartition(reasoning.OPEN)
        return "none" if not opening else "over" if reasoning.CLOSE in thought else "open"
    tail = state.llm.tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False).rstrip()
    return "open" if tail.endswith(reasoning.OPEN) else "over" if tail.endswith(reasoning.CLOSE) else "none"
