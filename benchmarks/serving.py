"""`leyden bench` by another door: python -P benchmarks/serving.py http|offline ... (--help tells the rest)"""

from __future__ import annotations

import sys

from leyden.server.cli import main as leyden


def main() -> int:
    return leyden(["bench", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
