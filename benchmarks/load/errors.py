"""Errors of a measurement."""

from __future__ import annotations

from ...engine.errors import LeydenError


class BenchError(LeydenError):
    """The measurement cannot be made. The message names the missing thing and the remedy."""

    is_failure = True


class BenchUsageError(BenchError):
    """A flag asks for something impossible."""

    is_failure = False
