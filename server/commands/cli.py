"""`leyden serve | generate | chat | info | bench`. Every setting is a flag; the flags are made from the schema."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_origin

from pydantic import BaseModel

from ... import __version__
from ...benchmarks.load.command import add_bench
from ...benchmarks.load.flags import positive_number
from ...configs.other_names import hint_for
from ...configs.schema import EngineConfig, Settings
from ...configs.sources import SettingsError, load_settings, nearest
from ...engine.errors import LeydenError
from ...engine.text.screen import for_screen, for_stdout

EXIT_USAGE = 2


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions keep their lines. Help ends in the default, unless there is none or the text has it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False and action.default not in ("", [])
        is_told = "(default" in (action.help or "")
        return super()._get_help_string(action) if has_default and not is_told else action.help


class _Parser(argparse.ArgumentParser):
    """argparse that suggests a flag for an unknown one."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs |= {"allow_abbrev": False, "formatter_class": _Help}
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        _, _, unknown = message.partition("unrecognized arguments: ")
        flags = [word.split("=")[0] for word in unknown.split(" ") if word.startswith("-")]
        hints = [f"{flag}: {hint}" if len(flags) > 1 else hint for flag in flags if (hint := self._hint(flag))]
        if choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            near = nearest(choice[1], re.findall(r"[\w-]+", choice[2]))
            hints += [f"did you mean {near}?"] if near else []
        told = f" ({'; '.join(hints)})" if hints else f"; see {self.prog} --help"
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}{told}\n")

    def _hint(self, flag: str) -> str | None:
        """A remedy for an unknown flag; None: no flag is near."""
        if flag in ("--model", "--model-path") and self._get_positional_actions():
            return f"the model comes without a flag: {self.prog} MODEL"
        if told := hint_for(flag, as_flags=True):
            return told
        near = nearest(flag, self._option_string_actions)
        return f"did you mean {near}?" if near else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for a failure, 2 for a wrong flag, setting or checkpoint."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model writes characters that a locale may not have
    arguments = list(sys.argv[1:] if argv is None else argv)
    known, unknown = _build_parser().parse_known_args(arguments)
    if unknown:  # the command's own parser has the flags to suggest
        known.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        code = known.run(known)
        sys.stdout.flush()
        return code
    except (LeydenError, SettingsError) as error:
        print(for_screen(f"leyden {known.command}: error: {error}"), file=sys.stderr)
        return EXIT_USAGE if not getattr(error, "is_failure", False) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has gone: write nothing more, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _build_parser() -> _Parser:
    """Each command sets `run` to its function and `parser` to its own parser."""
    parser = _Parser(prog="leyden", description="Serve hybrid linear-attention language models.")
    parser.add_argument("--version", action="version", version=f"leyden {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    serve = commands.add_parser("serve", help="serve a model over an OpenAI-compatible HTTP API")
    _add_settings(serve, Settings)
    serve.set_defaults(run=_serve, parser=serve)

    generate = commands.add_parser("generate", help="continue prompts, without a server")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT", help="text to continue")
    generate.add_argument("--chat", action="store_true", help="treat each prompt as a user's message")
    generate.add_argument("--model", default=argparse.SUPPRESS, help=EngineConfig.model_fields["model"].description)
    _add_sampling(generate, max_tokens=256)
    _add_settings(generate, EngineConfig, positional_model=False)
    generate.set_defaults(run=_generate, parser=generate)

    chat = commands.add_parser("chat", help="talk to a running server in the terminal")
    chat.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    chat.add_argument("--api-key", default=None, help="key, when the server wants one; or the first of LEYDEN_API_KEY")
    chat.add_argument("--model", default=None, help="served model; default: the first one")
    chat.add_argument("--system", default=None, help="system message")
    _add_sampling(chat, max_tokens=None)
    chat.set_defaults(run=_chat, parser=chat)

    info = commands.add_parser("info", help="show what a model is and how many sequences fit")
    _add_settings(info, EngineConfig)
    info.add_argument(
        "--memory-gb", type=positive_number, default=None, help="memory to plan for; default: this machine's"
    )
    info.set_defaults(run=_info, parser=info)

    add_bench(commands.add_parser("bench", help="measure a server, or the engine alone"))
    return parser


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int | None) -> None:
    """`max_tokens`: the default of the flag; None: the server's default."""
    left = "" if max_tokens else " (default: what the context has left)"
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"tokens of an answer at most{left}")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 = always the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.9, help="smallest set of tokens with this much probability")


def _add_settings(parser: argparse.ArgumentParser, schema: type[BaseModel], positional_model: bool = True) -> None:
    """One flag per field. Values stay text here: the schema parses and bounds them, whatever their source."""
    if positional_model:
        parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=_help("model", schema))
    parser.add_argument("--config", type=Path, default=None, metavar="FILE", help="YAML file of settings")
    for name, field in schema.model_fields.items():
        if name == "model":
            continue
        flag = "--" + name.replace("_", "-")
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help(name, schema)}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.annotation) is list:
            options |= {"action": "append", "metavar": "VALUE"}
        else:
            options["metavar"] = name.rsplit("_", maxsplit=1)[-1].upper()
        parser.add_argument(flag, **options)


def _help(name: str, schema: type[BaseModel]) -> str:
    field = schema.model_fields[name]
    allowed = getattr(field.annotation, "__args__", ())
    choices = f" [{' | '.join(allowed)}]" if allowed and all(isinstance(a, str) for a in allowed) else ""
    default = field.get_default(call_default_factory=True, validated_data={})
    return f"{field.description}{choices}" + (f" (default: {default})" if default not in (None, [], {}) else "")


def _settings(arguments: argparse.Namespace) -> Settings:
    flags = {name: value for name, value in vars(arguments).items() if name in Settings.model_fields}
    return load_settings(flags, arguments.config)


def _serve(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    # The first process of a container ignores SIGTERM without a handler. The server sets its own once it is imported.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    from .serve import serve

    return serve(settings)


def _generate(arguments: argparse.Namespace) -> int:
    config = _settings(arguments).engine()
    from ...engine.llm import LLM
    from ...engine.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=arguments.temperature, top_p=arguments.top_p)
    llm = LLM(**config.model_dump(exclude_unset=True))
    if arguments.chat:
        answers = llm.chat([[{"role": "user", "content": prompt}] for prompt in arguments.prompts], params)
    else:
        answers = llm.generate(arguments.prompts, params)
    for prompt, answer in zip(arguments.prompts, answers, strict=True):
        print(for_stdout(answer.text if arguments.chat else prompt + answer.text))
    return int(any(answer.finish_reason == "error" for answer in answers))


def _chat(arguments: argparse.Namespace) -> int:
    from .chat import chat

    return chat(arguments)


def _info(arguments: argparse.Namespace) -> int:
    config = _settings(arguments).engine()
    from .info import describe_model

    print(describe_model(config, arguments.memory_gb))
    return 0


if __name__ == "__main__":
    sys.exit(main())
