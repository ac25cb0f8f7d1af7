"""Makes untrusted text safe for a terminal: characters that would control the terminal are shown as escapes."""

from __future__ import annotations

import re
import sys

# C0 without tab and newline, DEL and C1; line separators; marks that reorder text; surrogates.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def for_screen(text: str) -> str:
    r"""The text with control characters as escapes, such as `\x1b`. All other characters stay, in any script."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def for_stdout(text: str) -> str:
    """`for_screen` if stdout is a terminal. A file or a pipe gets the text unchanged."""
    return for_screen(text) if sys.stdout.isatty() else text
