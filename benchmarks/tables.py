"""Write the tables of the README and of pages in docs/ from the runs in `benchmarks/results`.

Each has its place between two markers.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leyden.benchmarks.kernel_tables import choices_table, kernels_table, versions
from leyden.benchmarks.step_table import steps_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def serving_table(report: dict[str, Any]) -> str:
    """A row per case of `leyden bench http`."""
    started = f"start to ready {report['start_to_ready_s']} s; " if report["start_to_ready_s"] is not None else ""
    lines = [
        f"Model {report['model']}, {report['hardware']}; {started}prompts of {report['prompt_tokens']} tokens, "
        f"answers of {report['max_tokens']}.",
        "",
        "| load | first token, median | p99 | between tokens, median | p99 | tokens/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in report["cases"]:
        first, between = case["ttft_s"], case["itl_s"]
        cells = [milliseconds(times[point]) for times in (first, between) for point in ("p50", "p99")]
        failed = sum(case["errors"].values())
        name = case["name"] + (f" ({failed} of {case['requests']} requests failed)" if failed else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {case['output_tokens_per_s']:,.0f} |")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.1 else f"{1e3 * seconds:,.0f} ms"


MEASURES = {
    "ms_per_step": ("{:.1f}", "ms per step"),
    "answer_tokens_per_s": ("{:,.0f}", "answer tokens/s"),
    "prompt_tokens_per_s": ("{:,.0f}", "prompt tokens/s"),
}


def offline_table(reference: dict[str, Any], *reports: dict[str, Any]) -> str:
    """Each case of `leyden bench offline` by the measure that the reference has for it. `reports` are pairs of runs, of
    the reference's two models, a pair for each dtype of the recurrent state: a column each, beside the reference's."""
    pairs = list(zip(reports[::2], reports[1::2], strict=True))
    first, software = reports[0], reference["software"]
    names = [f"leyden, {dense['state_dtype']}" for dense, _ in pairs] + [f"{software}, {reference['state_dtype']}"]
    lines = [
        f"{first['hardware']}; {versions(first['software'])}; `linear_backend` {first['linear_backend']}. {software}: "
        f"{reference['hardware']}. The dtype is that of the recurrent state: leyden's default is float32, that of "
        f"{software} {reference['state_dtype']}.",
        "",
        f"| model | requests x prompt x answer | | {' | '.join(names)} |",
        f"|---|---|---|{'---:|' * len(names)}",
    ]
    models = [name for name, cases in reference.items() if isinstance(cases, dict)]
    for name, runs in zip(models, zip(*pairs, strict=True), strict=True):
        for label, measures in reference[name].items():
            for measure, value in measures.items():
                number, unit = MEASURES[measure]
                cases = [case_of(run, label) for run in runs]
                cells = " | ".join([number.format(case[measure]) if case else "–" for case in cases])
                cells += f" | {number.format(value)}"
                lines.append(f"| {name} | {label.replace('x', ' x ')} | {unit} | {cells} |")
    return "\n".join(lines)


def cases_table(report: dict[str, Any]) -> str:
    """A row per case of `leyden bench offline`."""
    weights, state, kv = (report["memory_bytes"][kind] / 1e9 for kind in ("weights", "state", "kv"))
    lines = [
        f"{report['hardware']}; {versions(report['software'])}; `linear_backend` {report['linear_backend']}, "
        f"{report['dtype']}, state {report['state_dtype']}; weights {weights:.1f} GB, states {state:.1f} GB, KV cache "
        f"{kv:.1f} GB.",
        "",
        "| requests x prompt x answer | ms per step | answer tokens/s | prompt tokens/s |",
        "|---|---:|---:|---:|",
    ]
    for case in report["cases"]:
        name = f"{case['requests']} x {case['prompt']} x {case['answer']}"
        is_prefill = case["answer"] == 1
        step = "-" if is_prefill else f"{case['ms_per_step']:.1f}"
        answer = "-" if is_prefill else f"{case['answer_tokens_per_s']:,.0f}"
        lines.append(f"| {name} | {step} | {answer} | {case['prompt_tokens_per_s']:,.0f} |")
    return "\n".join(lines)


def formats_table(*reports: dict[str, Any]) -> str:
    """Runs of one model whose weights are in several formats: milliseconds per step of each case."""
    first = reports[0]
    names = [report["engine"]["quantization"] for report in reports]
    lines = [
        f"{first['model'].rpartition('/')[2]}, {first['hardware']}; {versions(first['software'])}.",
        "",
        f"| requests x prompt x answer | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    weights = [f"{report['memory_bytes']['weights'] / 1e9:.1f} GB" for report in reports]
    lines.append(f"| weights | {' | '.join(weights)} |")
    for cases in zip(*(report["cases"] for report in reports), strict=True):
        label = " x ".join(str(cases[0][name]) for name in ("requests", "prompt", "answer"))
        times = [f"{case['ms_per_step']:,.1f} ms per step" for case in cases]
        lines.append(f"| {label} | {' | '.join(times)} |")
    return "\n".join(lines)


def case_of(report: dict[str, Any], label: str) -> dict[str, Any] | None:
    """The case "REQUESTSxPROMPTxANSWER" of an offline run; None where it did not run."""
    sizes = tuple(map(int, label.split("x")))
    return next((case for case in report["cases"] if (case["requests"], case["prompt"], case["answer"]) == sizes), None)


def api_process_table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['streams']} streams of {report['max_tokens']} tokens; {report['hardware']}, shared by the API "
        "process, the scripted engine and the client.",
        "",
        "| step | tokens/s | chunks/s | API process, per token | of a core | time to first token, median |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {case['step_ms']:g} ms | {case['tokens_per_s']:,} | {case['chunks_per_s']:,} "
        f"| {case['cpu_us_per_token']:.0f} µs | {100 * case['cpu_share']:.0f} % | {case['ttft_ms']:.0f} ms |"
        for case in report["cases"]
    ]
    return "\n".join(lines)


def stalls_table(report: dict[str, Any]) -> str:
    """The longest gaps of a stream and of /health beside something large."""
    outcome = "met" if report["is_met"] else "missed"
    lines = [
        f"{report['hardware']}, shared by the server, its engine and the clients. Goal, at most "
        f"{report['goal_ms']:g} ms: {outcome} in this run.",
        "",
        "| beside | `/health` | a running stream | a short chat |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {case['case']} | {case['health_ms']:.0f} ms | {case['stream_ms']:.0f} ms | {case['short_chat_ms']:.0f} ms |"
        for case in report["cases"]
    ]
    return "\n".join(lines)


def prefix_cache_table(report: dict[str, Any]) -> str:
    """Time to the first token by turn, with the cache and without."""
    on, off = report["runs"]["on"], report["runs"]["off"]
    aligned = " and ".join(f"{share:.0%} in blocks of {size}" for size, share in on["share_in_blocks_of"].items())
    lines = [
        f"Model {report['model']}, {report['hardware']}; {versions(report['software'])}. {report['conversations']} "
        f"conversations of {report['turns']} turns, {report['users']} at a time, that begin with one of "
        f"{report['systems']} system prompts of {report['system_tokens']:,} tokens (Zipf's law); each turn adds "
        f"{report['message_tokens']} tokens and an answer of {report['answer_tokens']}. Of the tokens that an earlier "
        f"prompt or answer began with, too, {on['cached_share']:.1%} were not computed again (if hits were whole "
        f"blocks: at most {aligned}).",
        "",
        "| turn | first token without the cache, median | with it | |",
        "|---:|---:|---:|---:|",
    ]
    for turn, without in off["first_token_ms"].items():
        slow, fast = without["median"], on["first_token_ms"][turn]["median"]
        lines.append(f"| {turn.removeprefix('turn ')} | {slow:.1f} ms | {fast:.1f} ms | {slow / fast:.1f}x |")
    return "\n".join(lines)


def pairs_table(report: dict[str, Any]) -> str:
    """The second of two prompts that part in the middle, with states on the way of the first and without."""
    on, off = report["runs"]["on"], report["runs"]["off"]
    lines = [
        f"Model {report['model']}, {report['hardware']}; {versions(report['software'])}. {len(report['pairs'])} pairs "
        f"of prompts of {report['prompt_tokens']:,} tokens that part where none has parted before. The states cost the "
        f"first prompt {report['prefill_cost']:.1%}, the median over the pairs.",
        "",
        "| | of the shared tokens found, mean | least | first token of the second prompt, median |",
        "|---|---:|---:|---:|",
    ]
    for name, run in (("with states on the way", on), ("without", off)):
        found = f"{run['found_share']:.0%} | {run['smallest_found_share']:.0%}"
        lines.append(f"| {name} | {found} | {run['second_ms']:.0f} ms |")
    return "\n".join(lines)


def spared_table(cache: dict[str, Any], pairs: dict[str, Any], drafts: dict[str, Any], session: dict[str, Any]) -> str:
    """What each kind of reuse spares, in a row of its own."""
    turns = [cache["runs"][run]["first_token_ms"]["turn 2"]["median"] for run in ("off", "on")]
    seconds = [pairs["runs"][run]["second_ms"] for run in ("off", "on")]
    rates = [drafts["tasks"]["edit"][run]["tokens_per_s"] for run in ("off", "on")]
    returns = session["compute_s"], statistics.median(session["restore_s"])
    tokens = f"{pairs['prompt_tokens']:,} tokens"
    rows = [
        (f"second turn of a chat after {cache['system_tokens']:,} tokens: first token", "{:.0f} ms", *turns),
        (f"prompt of {tokens} whose beginning another one shares: first token", "{:.0f} ms", *seconds),
        ("one stream that edits a given file, with drafts from the text", "{:.0f} tokens/s", *rates),
        (f"return to a conversation of {session['tokens']:,} tokens from a file", "{:.2f} s", *returns),
    ]
    lines = [f"Model dense, {session['device']}.", "", "| | without | with | |", "|---|---:|---:|---:|"]
    for name, unit, off, on in rows:
        lines.append(f"| {name} | {unit.format(off)} | {unit.format(on)} | {max(off, on) / min(off, on):.1f}x |")
    return "\n".join(lines)


def responsiveness_table(report: dict[str, Any]) -> str:
    """What waits while a long prompt is computed."""
    steps = report["steps_of_the_long_prompt_after_its_abort"]
    return "\n".join(
        [
            f"{report['device']}, the dense model at default settings; a prompt of {report['tokens']:,} tokens is "
            "computed, a prompt of 16 comes, and then the long one's client leaves.",
            "",
            "| most steps on their way | first token of the short prompt | chunks of the long one before it "
            "| steps of the long one after its abort |",
            "|---:|---:|---:|---:|",
            f"| {report['most_steps_launched_and_not_complete']} | {1e3 * report['short_first_token_s']:.0f} ms "
            f"| {report['long_chunks_before_it']} | {steps} |",
        ]
    )


def prompt_lookup_table(*reports: dict[str, Any]) -> str:
    """Tokens per second of one stream, with drafts and without, of each model."""
    first = reports[0]
    lines = [
        f"{first['hardware']}; {versions(first['software'])}; one stream, greedy, up to {first['speculative_tokens']} "
        "drafts a step.",
        "",
        "| model | task | without drafts | with drafts | | tokens per step | drafts that were right |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for report in reports:
        name = report["model"].rpartition("/")[2]
        for task, runs in report["tasks"].items():
            off, on = runs["off"]["tokens_per_s"], runs["on"]["tokens_per_s"]
            share = runs["on"]["accepted_share"]
            right = "none were made" if share is None else f"{share:.0%}"
            cells = f"{off:,.0f} tokens/s | {on:,.0f} tokens/s | {on / off:.2f}x"
            lines.append(f"| {name} | {task} | {cells} | {runs['on']['tokens_per_step']:.2f} | {right} |")
    return "\n".join(lines)


def sessions_table(report: dict[str, Any]) -> str:
    """A long conversation's way to a file and back, beside computing it again."""
    restored = statistics.median(report["restore_s"])
    return "\n".join(
        [
            f"{report['device']}; {report['tokens']:,} tokens, {report['gb']:.2f} GB.",
            "",
            "| compute | save, with fsync | restore, file not in memory | restore from the page cache | |",
            "|---:|---:|---:|---:|---:|",
            f"| {report['compute_s']:.1f} s | {report['save_s']:.2f} s | {report['restore_cold_s']:.2f} s "
            f"| {restored:.2f} s | {report['compute_s'] / restored:.0f}x |",
        ]
    )


README, PERFORMANCE, KERNELS = "README.md", "docs/performance.md", "docs/kernels.md"
RELIABILITY, QUANTIZATION = "docs/reliability.md", "docs/quantization.md"
QUANTISED = [f"serving-qwen3.5-9b-{name}-h200" for name in ("fp8", "int8", "int4")]
OFFLINE = ("serving-dense-h200", "serving-moe-h200", "serving-dense-bf16-h200", "serving-moe-bf16-h200")
QWEN = ("serving-qwen3.5-9b-h200", "serving-qwen3.5-35b-a3b-h200")
# A table's name -> the page it is on, how it is made, and the recorded runs that it needs.
TABLES: dict[str, tuple[str, Callable[..., str], list[str]]] = {
    "serving-cpu": (PERFORMANCE, serving_table, ["serving-cpu"]),
    "serving-offline-h200": (PERFORMANCE, offline_table, ["vllm-0.23-h200", *OFFLINE]),
    "serving-qwen-h200": (README, offline_table, ["vllm-0.23-qwen-h200", *QWEN]),
    "serving-http-h200": (PERFORMANCE, serving_table, ["serving-http-h200"]),
    "prefix-cache-h200": (PERFORMANCE, prefix_cache_table, ["prefix-cache-dense-h200"]),
    "prefix-cache-pairs-h200": (PERFORMANCE, pairs_table, ["prefix-cache-pairs-dense-h200"]),
    "spared-h200": (
        README,
        spared_table,
        ["prefix-cache-dense-h200", "prefix-cache-pairs-dense-h200", "prompt-lookup-dense-h200", "sessions-h200"],
    ),
    "responsiveness-h200": (PERFORMANCE, responsiveness_table, ["responsiveness-h200"]),
    "prompt-lookup-h200": (PERFORMANCE, prompt_lookup_table, ["prompt-lookup-dense-h200", "prompt-lookup-moe-h200"]),
    "prompt-lookup-qwen-h200": (PERFORMANCE, prompt_lookup_table, ["prompt-lookup-qwen3.5-9b-h200"]),
    "prefix-cache-qwen-h200": (PERFORMANCE, prefix_cache_table, ["prefix-cache-qwen3.5-9b-h200"]),
    "sessions-h200": (PERFORMANCE, sessions_table, ["sessions-h200"]),
    "sessions-qwen-h200": (PERFORMANCE, sessions_table, ["sessions-qwen3.5-9b-h200"]),
    "quantised-h200": (QUANTIZATION, formats_table, QUANTISED),
    "api-process-cpu": (PERFORMANCE, api_process_table, ["api-process-cpu"]),
    "stalls-cpu": (RELIABILITY, stalls_table, ["stalls-cpu"]),
    "kernels-h100": (KERNELS, kernels_table, ["kernels-h100"]),
    "choices-h100": (KERNELS, choices_table, ["kernels-h100"]),
    "kernels-h200": (KERNELS, kernels_table, ["kernels-h200"]),
    "kernels-delta-h200": (KERNELS, kernels_table, ["kernels-delta-h200"]),
    "serving-ring-mini-h200": (PERFORMANCE, cases_table, ["serving-ring-mini-h200"]),
    "steps-ring-mini-h200": (
        PERFORMANCE,
        steps_table,
        ["profile-ring-mini-h200", "../configs/ring-mini/config", "kernels-h200"],
    ),
    "steps-dense-h100": (PERFORMANCE, steps_table, ["profile-dense-h100", "../configs/dense/config", "kernels-h100"]),
    "steps-moe-h100": (PERFORMANCE, steps_table, ["profile-moe-h100", "../configs/moe/config", "kernels-h100"]),
}


def load(name: str, results: Path) -> Any:
    """A recorded run; None when there is none. A profile is a folder with a table for each step."""
    folder, file = results / name, results / f"{name}.json"
    if folder.is_dir():
        return [json.loads(path.read_text()) for path in sorted(folder.glob("*.table.json"))]
    return json.loads(file.read_text()) if file.exists() else None


def render(page: str, text: str, results: Path = RESULTS) -> str:
    """The page with every table as the results have it; one whose runs are not recorded has no place there."""
    for name, (home, table, files) in TABLES.items():
        if home != page:
            continue
        runs = [load(file, results) for file in files]
        missing = [file for file, run in zip(files, runs, strict=True) if run is None]
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if bool(pattern.search(text)) == bool(missing):
            wrong = f"of {', '.join(missing)}, which is not recorded" if missing else "no place for it"
            raise SystemExit(f"{page} has {wrong}: <!-- {name} --> <!-- /{name} -->")
        if not missing:
            made = table(*runs)
            text = pattern.sub(lambda m, made=made: f"{m.group(1)}{made}\n{m.group(2)}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say whether they are up to date")
    only_checks = parser.parse_args().check
    stale = []
    for page in dict.fromkeys(home for home, *_ in TABLES.values()):
        before = (ROOT / page).read_text()
        after = render(page, before)
        if before != after:
            stale.append(page)
            if not only_checks:
                (ROOT / page).write_text(after)
    if only_checks:
        print(f"stale: {', '.join(stale)}; run benchmarks/tables.py" if stale else "up to date")
        return int(bool(stale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
