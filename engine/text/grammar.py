"""Constrained decoding by llguidance (the extra `structured`): a grammar describes the allowed answers.

A grammar is compiled in a separate thread while its sequence waits. Before each token it gives a mask of the allowed
tokens. The size of a grammar, the work to compile it, and the work per token are bounded.
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
MAX_CONJUNCTIONS = 8  # of regular expressions in one grammar; every second one doubles llguidance's time
# With forcing, llguidance follows text that has only one continuation to its end, and a grammar like /a+/ "a" has no
# end. The last such line counts, so no grammar can undo it.
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
EMBEDDED = re.compile(r"%json\s*")
LISTED = re.compile(r"^ *\d+ \| ", re.MULTILINE)  # a line of the grammar, as errors quote it
LITERAL = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')
MAX_ITEMS = 8 * MAX_OPEN_PROPERTIES + 500  # Earley items of the parser at one position; a property takes 4 or 7
QUICK_SECONDS = 0.005  # per token; only time beyond it counts as slow
MAX_SLOW_SECONDS = 0.5  # slow time of one answer
MAX_KEPT = 32  # compiled grammars
T = TypeVar("T")
WHITE_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def is_available() -> bool:
    return importlib.util.find_spec("llguidance") is not None


def require(field: str) -> None:
    """Raise `RequestError`, which names the field, if the extra is missing."""
    if not is_available():
        raise RequestError(f"{field} needs constrained decoding: install the extra `structured`", field)


def json_rule(schema: dict[str, Any]) -> str:
    """JSON that a schema allows, as the right side of a rule. `schema`: from `schema_rewrite` or `schema_subset`.

    White space is fixed as `json.dumps` writes it. With free white space a model could go on for ever.
    """
    return f"%json {json.dumps(schema | {'x-guidance': WHITE_SPACE})}"


def regex_rule(pattern: str) -> str:
    """Text that a regular expression matches as a whole, as the right side of a rule. Rust's syntax, without
    look-around and back references."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(pattern)}/"


def choice_rule(choices: list[str]) -> str:
    """One of the texts, as the right side of a rule."""
    return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def json_grammar(schema: dict[str, Any]) -> str:
    """For `SamplingParams.grammar`: JSON that a schema allows. Raises `ValueError` if the schema allows nothing.

    A schema that llguidance does not support as a whole fails when it is compiled; `schema_subset.supported_subset`
    finds the supported part.
    """
    return f"start: {json_rule(rewrite(schema))}\n"


def regex_grammar(pattern: str) -> str:
    """For `SamplingParams.grammar`: text that a regular expression matches as a whole."""
    return f"start: {regex_rule(pattern)}\n"


def choice_grammar(choices: list[str]) -> str:
    """For `SamplingParams.grammar`: one of the texts."""
    return f"start: {choice_rule(choices)}\n"


def make_matcher(grammar: str, tokenizer: Any) -> Any:
    """llguidance's matcher of a grammar in its dialect of Lark. Raises `ValueError` with the cause."""
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
    """llguidance's error in one line, without quoted lines of the grammar. The client does not know a grammar made from
    its schema or pattern. A syntax error keeps its line and column: only a client's own grammar can have one."""
    told = error[: listed.start()] if (listed := LISTED.search(error)) else error
    told = re.sub(r"^at \d+\(\d+\): ", "", told)
    told = re.sub(r"^(\d+)\((\d+)\): ", r"line \1, column \2: ", told)
    told = re.sub(r"(?s)(?: \(in regex\))?: regex parse error:\n.*\nerror: ", ": regex parse error: ", told)
    return " ".join(told.split())


def _check_explosive(grammar: str) -> None:
    """Raise `ValueError` for a grammar whose cost llguidance's limits do not bound."""
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
        self.is_ready = False  # set by the engine once the grammar has compiled without an error

    @property
    def is_compiled(self) -> bool:
        """Whether compiling has ended, perhaps with an error."""
        return self.compiling.done()

    @property
    def error(self) -> str | None:
        """The reason why the grammar did not compile, or None. Only for a grammar that `is_compiled`."""
        error = self.compiling.exception()
        return None if error is None else str(error)

    @cached_property
    def _matcher(self) -> Any:
        return self.compiling.result().deep_copy()

    def fill(self, mask: np.ndarray) -> None:
        """Write the tokens allowed next to mask [ceil(V / 32)] int32, one bit per token. Allows no token after an
        error, or once slow tokens took more than MAX_SLOW_SECONDS."""
        if self._matcher.is_error() or self._matcher.is_stopped() or self._slow_seconds > MAX_SLOW_SECONDS:
            mask.fill(0)
        else:
            self._timed(self._matcher.unsafe_compute_mask_ptr, mask.ctypes.data, mask.nbytes)

    def accept(self, token_id: int) -> bool:
        """Advance by one token. Returns whether the grammar allowed it."""
        return bool(self._timed(self._matcher.consume_token, token_id))

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call `work` and add up its slow time. llguidance bounds the work of one token, but many slow tokens would
        still delay every sequence."""
        started = time.perf_counter()
        result = work(*arguments)
        self._slow_seconds += max(0.0, time.perf_counter() - started - QUICK_SECONDS)
        return result

    @property
    def is_over(self) -> bool:
        """Whether the grammar allows no further token."""
        return bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Compiles grammars in a thread of its own, one after another.

    load: returns the tokenizer (`Tokenizer.for_grammars`). It is called for the first grammar, or by `prepare`.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._prepared: Future[Any] | None = None
        self._kept: OrderedDict[str, Future[Any]] = OrderedDict()  # by the grammar's text, least recently used first
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    def compile(self, grammar: str) -> Grammar:
        """Start to compile a grammar. An equal grammar among the last `MAX_KEPT` is not compiled again, unless it
        failed."""
        compiling = self._kept.pop(grammar, None)
        if compiling is None or (compiling.done() and compiling.exception() is not None):
            compiling = self._thread.submit(lambda: make_matcher(grammar, self._tokenizer))
        self._kept[grammar] = compiling
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return Grammar(compiling)

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Run other work on grammars in the same thread, after all earlier work, and so never on an event loop."""
        return self._thread.submit(work)

    def prepare(self) -> None:
        """Load the tokenizer before requests arrive. With 200,000 tokens, loading holds Python's lock for a second."""
        if is_available():
            self._prepared = self._thread.submit(lambda: self._tokenizer)

    def wait(self) -> None:
        """Wait until `prepare` is done, if it was called."""
        if self._prepared is not None:
            with contextlib.suppress(CheckpointError):  # each request with a grammar will get the error
                self._prepared.result()

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load()
