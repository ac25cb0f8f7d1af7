"""Text of a model or a server for a terminal: what would steer the terminal is shown as an escape instead."""

from __future__ import annotations

import re
import sys

# C0 but tab and newline, DEL and C1; line separators; what reorders the text around it; halves of characters.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def for_screen(text: str) -> str:
    r"""The text with control characters written out: ESC as `\x1b`. Everything else stays, in any script."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def for_stdout(text: str) -> str:
    """`for_screen`, where the output is one; a file or a pipe gets the text as it is."""
    return for_screen(text) if sys.stdout.isatty() else text
