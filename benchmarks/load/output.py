"""The JSON of a measurement: checks of files before it, and the writing after it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from .errors import BenchUsageError


def add_out(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="write the JSON here too")


def require_writable(flag: str, path: Path | None) -> None:
    """Raise `BenchUsageError` if the file of `flag` cannot be written: before minutes of measuring, not after them."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise BenchUsageError(f"{flag} {path}: there is no folder {path.parent}; make it, or name another file")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BenchUsageError(f"{flag} {path}: cannot be written; name another file")


def require_folder(flag: str, path: Path | None) -> None:
    """Make the folder of `flag`, if one is given. Raises `BenchUsageError` if it cannot be made or written into."""
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchUsageError(f"{flag} {path}: {error.strerror}; name another folder") from None
    if path is not None and not os.access(path, os.W_OK):
        raise BenchUsageError(f"{flag} {path}: cannot be written into; name another folder")


def finish(report: dict[str, Any], out: Path | None) -> None:
    """Print the JSON as the last line, then write it to `out`. If the file fails, the line has been printed."""
    print(json.dumps(report), flush=True)
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
