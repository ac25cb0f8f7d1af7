"""Where the JSON of a measurement goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import BenchError


def add_out(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="write the JSON here too")


def check_folders(*files: Path | None) -> None:
    """Before anything is measured: each file's folder is there. Raises `BenchError`."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise BenchError(f"{file}: there is no folder {file.parent}; make it first")


def finish(report: dict[str, Any], out: Path | None) -> None:
    """The JSON, as the last line and in a file if one was asked for."""
    print(json.dumps(report), flush=True)
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
