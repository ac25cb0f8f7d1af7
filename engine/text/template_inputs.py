"""Finds the variables that a chat template reads, from its source, without rendering it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Names that transformers passes to every template, and arguments that change how it renders one.
SPECIAL_TOKENS = {f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
ARGUMENTS = {"messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message"}
ARGUMENTS |= {"chat_template", "tokenize"}
OF_RENDERER = frozenset({"raise_exception", "strftime_now", *ARGUMENTS, *SPECIAL_TOKENS, *DEFAULT_NAMESPACE})


@dataclass(frozen=True)
class TemplateInputs:
    """The names and string constants in a template."""

    settings: frozenset[str]  # variables that a caller may set
    words: frozenset[str]  # all string constants, including the values that the template compares settings with
    reserved: frozenset[str]  # names that belong to the renderer


class _Generation(Extension):
    """transformers' tag `generation` around the assistant's text."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_ENVIRONMENT = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])


def template_inputs(sources: Iterable[str], reserved: Iterable[str] = ()) -> TemplateInputs:
    """The inputs of several templates together. A template with a syntax error has none.

    reserved: more names that a caller may not set.
    """
    names: set[str] = set()
    words: set[str] = set()
    for source in sources:
        try:
            tree = _ENVIRONMENT.parse(source)
        except TemplateSyntaxError:  # rendering the template will raise it
            continue
        words |= {const.value for const in tree.find_all(nodes.Const) if isinstance(const.value, str)}
        names |= meta.find_undeclared_variables(tree)  # last: it folds constants of the tree
    own = OF_RENDERER | frozenset(reserved)
    return TemplateInputs(frozenset(names) - own, frozenset(words), own)
