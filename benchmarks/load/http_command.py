"""The command `leyden bench http`: its flags, and the plan that they describe."""

from __future__ import annotations

import argparse
import sys

from ...configs.schema import DEMO_MODEL
from .errors import BenchError, BenchUsageError
from .flags import Span, number, picture_file, positive, positive_number
from .goodput import Bound
from .load import Load, Workload
from .output import add_out, finish, require_writable
from .plan import Background, Case, Plan
from .target import Target

HTTP = """Measure a server from outside: time to first token, time between tokens, end to end, throughput, goodput.

  --concurrency 1 8 64         three cases: so many streams, each sends its next request when the last one ends
  --rate 2 8                   two cases: so many requests per second arrive by themselves, at random (Poisson)
  --background-rate 0 2        each of them alone, then while 2 long prompts arrive per second: what do these do to the
                               time between tokens?

Prompts differ, every answer has exactly --max-tokens (--no-ignore-eos: at most), and a warm-up round is not counted.
benchmarks/load/report.py says how each latency is taken."""
DEFAULT_STREAMS = [1, 8]
REQUESTS_PER_STREAM = 5
SECONDS_OF_ARRIVALS = 30
VOCAB_SIZE = 1000
BACKGROUND_PROMPT = 4096


def add_http(parser: argparse.ArgumentParser) -> None:
    """Give `leyden bench http` its flags."""
    parser.description = HTTP
    _add_server(parser.add_argument_group("the server"))
    _add_load(parser.add_argument_group("the load"))
    _add_requests(parser.add_argument_group("the requests"))
    _add_client(parser.add_argument_group("the client"))


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default=None, help="measure this server instead of starting one")
    group.add_argument("--api-key", default=None, help="key, when the server wants one")
    group.add_argument(
        "--model",
        default=None,
        help="with --url the name to ask for (default: the first one served), "
        "else the checkpoint to serve (default: demo)",
    )
    group.add_argument(
        "--serve-args",
        default="",
        metavar="ARGS",
        help="flags for the server started here, in one string: --serve-args='--max-num-seqs 256'",
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--concurrency",
        type=positive,
        nargs="+",
        metavar="STREAMS",
        help=f"streams at once, one case each (default: {' '.join(map(str, DEFAULT_STREAMS))})",
    )
    how.add_argument("--rate", type=positive_number, nargs="+", help="arrivals per second on average, one case each")
    group.add_argument(
        "--requests",
        type=positive,
        default=None,
        help=f"requests of each case (default: {REQUESTS_PER_STREAM} per stream, or what arrives in "
        f"{SECONDS_OF_ARRIVALS} s)",
    )
    group.add_argument(
        "--warmup",
        type=int,
        choices=range(10),
        default=1,
        metavar="ROUNDS",
        help="rounds of short answers before each case, not counted",
    )
    group.add_argument(
        "--background-rate",
        type=number,
        nargs="+",
        default=[0.0],
        metavar="RATE",
        help="requests per second that arrive beside each case and are not in its latencies; several give a case "
        "each (default: 0)",
    )
    group.add_argument(
        "--background-prompt-tokens",
        type=Span.parse,
        default=None,
        metavar="TOKENS",
        help=f"length of their prompts (default: {BACKGROUND_PROMPT}, or what fits the context)",
    )
    group.add_argument(
        "--background-max-tokens", type=Span.parse, default=Span(1, 1), metavar="TOKENS", help="length of their answers"
    )
    group.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals")


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--endpoint", choices=("completions", "chat"), default="completions", help="the route to ask")
    group.add_argument(
        "--prompt",
        choices=("ids", "text"),
        default=None,
        help="random token ids, of exact length, or common words, of about one token each (default: ids for "
        "completions, text for chat)",
    )
    group.add_argument(
        "--vocab-size",
        type=positive,
        default=None,
        help=f"ids are drawn below this (default: the model's if served here, else {VOCAB_SIZE})",
    )
    group.add_argument(
        "--prompt-tokens",
        type=Span.parse,
        default=Span(128, 128),
        metavar="TOKENS",
        help="length of a prompt, or MIN:MAX",
    )
    group.add_argument(
        "--max-tokens",
        type=Span.parse,
        default=Span(128, 128),
        metavar="TOKENS",
        help="length of an answer, or MIN:MAX",
    )
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answers of exactly --max-tokens; another length is counted as an error",
    )
    group.add_argument("--temperature", type=float, default=0.7, help="0 = always the likeliest token")
    group.add_argument(
        "--token-ids",
        action="store_true",
        help="ask for return_token_ids, so that a token without text has its chunk too",
    )


def _add_client(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers",
        type=positive,
        default=None,
        help="processes that share the load (default: one per 16 streams, at most 8 and the cores but two)",
    )
    group.add_argument("--timeout", type=positive_number, default=600.0, metavar="SECONDS", help="of one request")
    group.add_argument(
        "--goodput",
        type=Bound.parse,
        nargs="+",
        default=[],
        metavar="LATENCY:TIME",
        help="report the share and rate of requests within these bounds: ttft:200ms itl:50ms tpot:40ms e2e:5s",
    )
    group.add_argument(
        "--picture",
        type=picture_file,
        default=None,
        metavar="FILE",
        help="draw the distributions into this .png or .svg",
    )
    add_out(group)


def run_http(arguments: argparse.Namespace) -> int:
    from .picture import draw, require_matplotlib
    from .report import print_report
    from .serving import measure_serving, serving

    if arguments.endpoint == "chat" and arguments.prompt == "ids":
        raise BenchUsageError("--prompt ids needs --endpoint completions: the messages of a chat are text")
    if arguments.picture:
        require_matplotlib()
    require_writable("--out", arguments.out)
    require_writable("--picture", arguments.picture)
    checkpoint = arguments.model or DEMO_MODEL
    with serving(arguments.url, arguments.api_key, checkpoint, arguments.serve_args) as (target, ready):
        name, context = _served(target, arguments.model if arguments.url else None)
        vocab_size = arguments.vocab_size or (VOCAB_SIZE if arguments.url else _vocab_size(checkpoint))
        if any(arguments.background_rate) and arguments.background_prompt_tokens is None:
            arguments.background_prompt_tokens = _background_prompt(context, arguments.background_max_tokens)
        plan = _plan(arguments, name, vocab_size)
        _require_context(plan, context)
        report, latencies = measure_serving(target, plan)
    report = {"start_to_ready_s": ready, **report}
    print_report(report)
    finish(report, arguments.out)
    if arguments.picture:
        draw(latencies, f"{report['model']}, {report['endpoint']}", arguments.picture)
    return 0


def _vocab_size(checkpoint: str) -> int:
    from ...models.families.registry import read_config
    from ...models.loading.checkpoint import resolve

    return read_config(resolve(checkpoint, None, weights=False)).vocab_size


def _served(target: Target, wanted: str | None) -> tuple[str, int | None]:
    """The name of the model to ask for (`wanted`, else the first one served), and its context if that is told."""
    from .serving import served_models

    try:
        models = served_models(target)
    except BenchError:
        if wanted is None:
            raise
        models = {}
    name = wanted or next(iter(models))
    return name, models.get(name)


def _require_context(plan: Plan, context: int | None) -> None:
    """Raise `BenchUsageError` for ids that exceed the context. The length of a text is known to the server alone."""
    if context is None or plan.workload.prompt_kind != "ids":
        return
    spans = [("", plan.workload.prompt_tokens, plan.workload.max_tokens)]
    spans += [("background-", c.background.prompt_tokens, c.background.max_tokens) for c in plan.cases if c.background]
    for kind, prompt, answer in spans:
        if prompt.high + answer.high > context:
            raise BenchUsageError(
                f"--{kind}prompt-tokens {prompt} and --{kind}max-tokens {answer} are up to "
                f"{prompt.high + answer.high:,} tokens, and {plan.workload.model!r} has a context of {context:,} "
                "(max_model_len in /v1/models); lower one of them"
            )


def _background_prompt(context: int | None, answer: Span) -> Span:
    """The default length, or the room that the served model's context leaves beside the answer."""
    if context is None or BACKGROUND_PROMPT + answer.high <= context:
        return Span(BACKGROUND_PROMPT, BACKGROUND_PROMPT)
    length = max(1, context - answer.high)
    print(f"background prompts have {length:,} tokens: the context is {context:,}", file=sys.stderr)
    return Span(length, length)


def _plan(arguments: argparse.Namespace, model: str, vocab_size: int) -> Plan:
    workload = Workload(
        endpoint=arguments.endpoint,
        model=model,
        prompt_kind=arguments.prompt or ("ids" if arguments.endpoint == "completions" else "text"),
        prompt_tokens=arguments.prompt_tokens,
        max_tokens=arguments.max_tokens,
        vocab_size=vocab_size,
        temperature=arguments.temperature,
        ignore_eos=arguments.ignore_eos,
        wants_token_ids=arguments.token_ids,
        seed=arguments.seed,
    )
    return Plan(
        workload=workload,
        cases=_cases(arguments),
        bounds=arguments.goodput,
        num_workers=arguments.workers,
        warm_up_rounds=arguments.warmup,
        timeout=arguments.timeout,
    )


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """A case for each pair of a load and a background."""
    lengths = (arguments.background_prompt_tokens, arguments.background_max_tokens)
    backgrounds = [Background(rate, *lengths) if rate else None for rate in arguments.background_rate]
    return [Case(load, background) for load in _loads(arguments) for background in backgrounds]


def _loads(arguments: argparse.Namespace) -> list[Load]:
    given = arguments.requests
    if arguments.rate:
        return [Load(given or max(1, round(SECONDS_OF_ARRIVALS * rate)), rate=rate) for rate in arguments.rate]
    return [
        Load(given or REQUESTS_PER_STREAM * streams, concurrency=streams)
        for streams in arguments.concurrency or DEFAULT_STREAMS
    ]
