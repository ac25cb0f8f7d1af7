"""Constrained decoding by llguidance (the extra `structured`): a grammar describes the answers that are allowed.

A grammar is compiled in a separate thread while its sequence waits. Its size, the work to compile it and the work for
each token are bounded. Before each token it gives a mask of the allowed tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from ..errors import CheckpointError, RequestError
from .json_schema import MAX_OPEN_PROPERTIES, check_schema
from .schema_rewrite import rewrite

MAX_GRAMMAR_CHARS = 1 << 18
MAX_CONJUNCTIONS = 8  # of regular expressions in one grammar, for llguidance's time doubles with every other one
# Text that can only go on in one way would be looked up to its end, which a grammar like /a+/ "a" has not. The last
# such line counts, so that no grammar can undo it.
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
EMBEDDED = re.compile(r"%json\s*")
LISTED = re.compile(r"^ *\d+ \| ", re.MULTILINE)  # a line of a grammar in an error
LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')
MAX_ITEMS = 8 * MAX_OPEN_PROPERTIES + 500  # that a parser keeps in mind at one place; a property is 4 of them, or 7
QUICK_SECONDS = 0.005  # for a token; what lies beyond is added up
MAX_SLOW_SECONDS = 0.5  # of one answer
MAX_KEPT = 32  # compiled grammars
T = TypeVar("T")
WHITE_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def is_available() -> bool:
    return importlib.util.find_spec("llguidance") is not None


def require(field: str) -> None:
    """Raises `RequestError` where the extra is missing."""
    if not is_available():
        raise RequestError(f"{field} needs constrained decoding: install the extra `structured`", field)


def json_rule(schema: dict[str, Any]) -> str:
    """JSON that a schema allows, as the right side of a rule; `schema` is one of `schema_rewrite` or `schema_subset`.

    White space is that of `json.dumps`: where a model may choose, it may go on for ever.
    """
    return f"%json {json.dumps(schema | {'x-guidance': WHITE_SPACE})}"


def regex_rule(pattern: str) -> str:
    """Text that a regular expression matches as a whole (Rust's syntax, without look-around and back references)."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(pattern)}/"


def choice_rule(choices: list[str]) -> str:
    """One of some texts."""
    return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def json_grammar(schema: dict[str, Any]) -> str:
    """For `SamplingParams.grammar`: JSON that a schema allows.

    A schema that llguidance cannot hold as a whole is an error of the request; `schema_subset.supported_subset` tells
    what can be kept of it. Raises `ValueError` where a schema allows nothing.
    """
    return f"start: {json_rule(rewrite(schema))}\n"


def regex_grammar(pattern: str) -> str:
    """For `SamplingParams.grammar`: text that a regular expression matches as a whole."""
    return f"start: {regex_rule(pattern)}\n"


def choice_grammar(choices: list[str]) -> str:
    """For `SamplingParams.grammar`: one of some texts."""
    return f"start: {choice_rule(choices)}\n"


def make_matcher(grammar: str, tokenizer: Any) -> Any:
    """llguidance's matcher of a grammar in its dialect of Lark. Raises `ValueError` that says what is wrong."""
    from llguidance import LLMatcher, LLParserLimits

    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"the grammar has {len(grammar)} characters; at most {MAX_GRAMMAR_CHARS} are taken")
    _check_explosive(grammar)
    limits = LLParserLimits(
        initial_lexer_fuel=500_000, step_lexer_fuel=100_000, max_grammar_size=200_000, max_items_in_row=MAX_ITEMS
    )
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar + NO_FORCING), log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(_cause(matcher.get_error()))
    return matcher


def _cause(error: str) -> str:
    """llguidance's error in one line, without its listing of the grammar and places in that listing: after a schema or
    a pattern the client has not seen the grammar. Wrong syntax keeps its place: only a client's own grammar has any."""
    told = error[: listed.start()] if (listed := LISTED.search(error)) else error
    told = re.sub(r"^at \d+\(\d+\): ", "", told)
    told = re.sub(r"^(\d+)\((\d+)\): ", r"line \1, column \2: ", told)
    told = re.sub(r"(?s)(?: \(in regex\))?: regex parse error:\n.*\nerror: ", ": regex parse error: ", told)
    return " ".join(told.split())


def _check_explosive(grammar: str) -> None:
    """Raises `ValueError` for a grammar whose cost none of llguidance's limits bounds."""
    if LITERAL.sub("", grammar).count("&") > MAX_CONJUNCTIONS:
        raise ValueError(f"the grammar has more than {MAX_CONJUNCTIONS} conjunctions (&)")
    for found in EMBEDDED.finditer(grammar):
        schema, _ = json.JSONDecoder().raw_decode(grammar, found.end())
        if isinstance(schema, dict):
            check_schema(schema)


class Grammar:
    """The grammar of one sequence, after the tokens given to `accept`. Sequences may share the compiled grammar."""

    def __init__(self, compiling: Future[Any]) -> None:
        self.compiling = compiling
        self._slow_seconds = 0.0
        self.is_ready = False  # until the engine has seen that it compiled

    @property
    def is_compiled(self) -> bool:
        """Compiling has ended, perhaps with an error."""
        return self.compiling.done()

    @property
    def error(self) -> str | None:
        """Why it could not be compiled, once it `is_compiled`."""
        error = self.compiling.exception()
        return None if error is None else str(error)

    @cached_property
    def _matcher(self) -> Any:
        return self.compiling.result().deep_copy()

    def fill(self, mask: np.ndarray) -> None:
        """Write the tokens allowed next to mask [ceil(V / 32)] int32, one bit each. After an error, or once slow tokens
        took too long, none is allowed."""
        if self._matcher.is_error() or self._matcher.is_stopped() or self._slow_seconds > MAX_SLOW_SECONDS:
            mask.fill(0)
        else:
            self._timed(self._matcher.unsafe_compute_mask_ptr, mask.ctypes.data, mask.nbytes)

    def accept(self, token_id: int) -> bool:
        """Advance by one token; returns whether the grammar allowed it."""
        return bool(self._timed(self._matcher.consume_token, token_id))

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call `work` and add up its slow time. llguidance bounds one token's work; many slow tokens would still delay
        every sequence."""
        started = time.perf_counter()
        result = work(*arguments)
        self._slow_seconds += max(0.0, time.perf_counter() - started - QUICK_SECONDS)
        return result

    @property
    def is_over(self) -> bool:
        """The grammar allows no further token."""
        return bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Compiles grammars in a thread of its own, one after another. `load` returns the tokenizer
    (`Tokenizer.for_grammars`); it is called for the first grammar, or by `prepare`."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._prepared: Future[Any] | None = None
        self._kept: OrderedDict[str, Future[Any]] = OrderedDict()  # by the grammar's text, the last asked for last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    def compile(self, grammar: str) -> Grammar:
        """Equal grammars are compiled once, as long as they are among the last `MAX_KEPT`."""
        compiling = self._kept.pop(grammar, None)
        if compiling is None or (compiling.done() and compiling.exception() is not None):
            compiling = self._thread.submit(lambda: make_matcher(grammar, self._tokenizer))
        self._kept[grammar] = compiling
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return Grammar(compiling)

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Other work on grammars, in the same thread: it takes its turn and never runs on an event loop."""
        return self._thread.submit(work)

    def prepare(self) -> None:
        """Load the tokenizer before requests arrive: with 200,000 tokens it holds Python's lock for a second."""
        if is_available():
            self._prepared = self._thread.submit(lambda: self._tokenizer)

    def wait(self) -> None:
        """Wait until `prepare` is done, if it was called."""
        if self._prepared is not None:
            with contextlib.suppress(CheckpointError):  # then each request that brings a grammar is told
                self._prepared.result()

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load()
