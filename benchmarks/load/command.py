"""The two commands of `leyden bench`, and the flags of `offline`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .flags import OFFLINE_CASES, OfflineCase, positive, setting
from .http_command import add_http, run_http
from .output import add_out, finish, require_folder, require_writable

DESCRIPTION = """Measure a server as its clients see it, or the engine without HTTP.

  leyden bench http                               start leyden's own server, load it with 1 and with 8 streams, stop it
  leyden bench http --url http://host:8000        any OpenAI-compatible server that is running
  leyden bench offline                            the engine alone, token ids in and out
  leyden bench offline --profile                  the same, and where the time of a step goes

Both print a table, and one JSON object as the last line."""


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Give `leyden bench` its two commands."""
    parser.description = DESCRIPTION
    commands = parser.add_subparsers(dest="bench", required=True, metavar="COMMAND")
    http = commands.add_parser("http", help="a server, from a client")
    add_http(http)
    http.set_defaults(run=run_http, parser=http)
    offline = commands.add_parser("offline", help="the engine alone")
    _add_offline(offline)
    offline.set_defaults(run=run_offline, parser=offline)


def _add_offline(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure the engine without HTTP: each case hands in its requests at once, greedy, and takes the time until "
        "the last one ends, after a run with short answers that is not counted."
    )
    parser.add_argument("--model", default="demo", help="checkpoint folder, hub id, or 'demo'")
    parser.add_argument(
        "--cases",
        nargs="+",
        type=OfflineCase.parse,
        metavar="REQUESTSxPROMPTxANSWER",
        default=None,
        help="requests at once, tokens of each prompt, tokens of each answer (default: those that fit the context of "
        f"{OFFLINE_CASES})",
    )
    parser.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy = random weights, from a config.json alone",
    )
    parser.add_argument(
        "--engine", nargs="*", type=setting, default=[], metavar="KEY=VALUE", help="engine settings, as in YAML"
    )
    parser.add_argument("--repeats", type=positive, default=1, help="runs per case; the median one is reported")
    parser.add_argument(
        "--profile",
        nargs="?",
        type=Path,
        const=Path("profile"),
        default=None,
        metavar="DIR",
        help="trace some steps of each decode batch and one full prompt step into this folder "
        "(default: ./profile) and show what ran in them",
    )
    add_out(parser)


def run_offline(arguments: argparse.Namespace) -> int:
    from .offline import measure_offline, print_offline

    require_writable("--out", arguments.out)
    require_folder("--profile", arguments.profile)
    report = measure_offline(
        arguments.model,
        arguments.cases,
        load_format=arguments.load_format,
        engine=dict(arguments.engine),
        repeats=arguments.repeats,
        profile_folder=arguments.profile,
    )
    print_offline(report)
    finish(report, arguments.out)
    return 0
