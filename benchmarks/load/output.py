"""Where the JSON of a measurement goes."""

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
    """Before minutes of measuring. Raises `BenchUsageError` when the file that `flag` asks for cannot be written."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise BenchUsageError(f"{flag} {path}: there is no folder {path.parent}; make it, or name another file")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BenchUsageError(f"{flag} {path}: cannot be written; name another file")


def require_folder(flag: str, path: Path | None) -> None:
    """Make the folder that `flag` asks for, if any. Raises `BenchUsageError` when that cannot be."""
    try:
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchUsageError(f"{flag} {path}: {error.strerror}; name another folder") from None
    if path is not None and not os.access(path, os.W_OK):
        raise BenchUsageError(f"{flag} {path}: cannot be written into; name another folder")


def finish(report: dict[str, Any], out: Path | None) -> None:
    """The JSON, as the last line and then in a file if one was asked for: the line stays if the file fails."""
    print(json.dumps(report), flush=True)
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
