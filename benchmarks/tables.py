"""Write the README's tables from the recorded runs in `benchmarks/results`, between their markers.

python -P benchmarks/tables.py [--check]     --check only says whether the README is up to date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def serving_table(report: dict[str, Any]) -> str:
    lines = [
        f"Embedded model, {report['hardware']}; start to ready {report['start_to_ready_s']} s; "
        f"{report['max_tokens']} tokens per answer.",
        "",
        "| streams | time to first token, median | slowest | tokens/s |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {case['streams']} | {case['ttft_s'] * 1e3:.0f} ms | {case['ttft_max_s'] * 1e3:.0f} ms "
        f"| {case['tokens_per_s']:.0f} |"
        for case in report["cases"]
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"serving-cpu": serving_table}


def render(readme: str) -> str:
    """The README with every table as the results have it."""
    for name, table in TABLES.items():
        report = json.loads((RESULTS / f"{name}.json").read_text())
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(readme):
            raise SystemExit(f"README.md has no place for the table {name}")
        readme = pattern.sub(lambda m, text=table(report): f"{m.group(1)}{text}\n{m.group(2)}", readme)
    return readme


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text()
    after = render(before)
    if "--check" in sys.argv[1:]:
        print("up to date" if before == after else "README.md is stale; run benchmarks/tables.py")
        return int(before != after)
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
