"""Where the JSON of a measurement goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_out(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="write the JSON here too")


def finish(report: dict[str, Any], out: Path | None) -> None:
    """The JSON, as the last line and in a file if one was asked for."""
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
